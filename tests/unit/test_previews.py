"""What a preview is made of: the clean latents that a step headed for."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler, SchedulerMixin

from worker_service.models import schedulers
from worker_service.models.previews import Sight


def followed(scheduler: SchedulerMixin, **step: Any) -> torch.Tensor | None:
    sight = Sight(None, 64, 64)  # the pipeline is for decoding
    sight.follow(scheduler)
    scheduler.step(return_dict=False, **step)
    return sight.predicted


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++_2m", "dpm++_2m_sde", "euler", "euler_a", "heun", "unipc"])
def test_a_step_whose_noise_is_guessed_right_shows_the_clean_image(name: str) -> None:
    own = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    scheduler = schedulers.fresh(own, name)
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(1)
    # Kept small: some schedulers clip what they predict to [-1, 1].
    clean, noise = (0.3 * torch.randn(2, 4, 8, 8, generator=generator).clamp(-1, 1) for _ in range(2))
    time = scheduler.timesteps[3]
    noisy = scheduler.add_noise(clean, noise, time.reshape(1))
    predicted = followed(scheduler, model_output=noise, timestep=time, sample=noisy)
    assert predicted is not None
    assert torch.allclose(predicted, clean, atol=1e-3)
    assert not torch.allclose(noisy, clean, atol=1e-1)


def test_a_step_of_flow_matching_shows_the_end_of_its_line() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    time = scheduler.timesteps[3]
    noisy = scheduler.scale_noise(clean, time.reshape(1), noise)
    predicted = followed(scheduler, model_output=noise - clean, timestep=time, sample=noisy)
    assert predicted is not None
    assert torch.allclose(predicted, clean, atol=1e-4)
