"""The schedulers that a model offers, and the schedule of an img2img call: it runs at least one step."""

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
)

from worker_service.models.generation.schedulers import ALLOWED, compatible_names, img2img_schedule, most_steps


@pytest.mark.parametrize(
    ("own", "offered"),
    [
        (DDIMScheduler(), sorted(ALLOWED)),
        (DDIMScheduler(prediction_type="v_prediction"), sorted(ALLOWED)),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            ["dpm++_2m", "dpm++_2m_sde", "unipc"],
        ),
        (FlowMatchEulerDiscreteScheduler(), []),
    ],
    ids=["noise", "velocity", "flow, as in Sana", "flow matching"],
)
def test_only_schedulers_that_can_run_the_model_are_offered(own: SchedulerMixin, offered: list[str]) -> None:
    assert sorted(compatible_names(own)) == offered


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), DDIMScheduler(num_train_timesteps=49), LCMScheduler()])
@pytest.mark.parametrize("strength", [5e-324, 1e-7, 0.01, 1 / 49, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 49])
def test_at_least_one_step_runs_and_the_scheduler_takes_them(
    scheduler: SchedulerMixin, strength: float, steps: int
) -> None:
    scheduled, share = img2img_schedule(scheduler, steps, strength, all_steps_run=False)
    scheduler.set_timesteps(scheduled)
    assert 1 <= int(scheduled * share) <= max(1, int(steps * strength))
    assert share == pytest.approx(strength) or strength < share <= 1 / most_steps(scheduler) + 1e-9


@pytest.mark.parametrize("strength", [1e-7, 0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_consistency_model_runs_all_its_steps_within_the_strength(strength: float, steps: int) -> None:
    scheduler = LCMScheduler()
    scheduled, share = img2img_schedule(scheduler, steps, strength, all_steps_run=True)
    scheduler.set_timesteps(scheduled, strength=share)
    assert 1 <= len(scheduler.timesteps) <= steps
