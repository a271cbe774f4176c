"""The schedule of an img2img call: at least one step runs, and the scheduler takes the number of steps."""

import pytest
from diffusers import DDIMScheduler, LCMScheduler, SchedulerMixin

from worker_service.models.schedulers import img2img_schedule, most_steps


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
