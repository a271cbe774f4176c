"""Previews show the clean latents that a step predicts."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler, SchedulerMixin

from worker_service.models.generation import schedulers
from worker_service.models.generation.previews import Previewer, on_white


def test_a_transparent_image_is_composited_on_white() -> None:
    red = np.array([0.8, 0.2, 0.0, 1.0])
    images = np.stack([red, red * [1, 1, 1, 0.5], red * [1, 1, 1, 0]]).reshape(1, 1, 3, 4)
    expected = np.array([[0.8, 0.2, 0.0], [0.9, 0.6, 0.5], [1.0, 1.0, 1.0]]).reshape(1, 1, 3, 3)
    assert np.allclose(on_white(images), expected)


def predicted_by(scheduler: SchedulerMixin, **step: Any) -> torch.Tensor | None:
    previewer = Previewer(None, 64, 64)  # the pipeline is only needed to decode
    previewer.record_predictions(scheduler)
    scheduler.step(return_dict=False, **step)
    return previewer.predicted


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++_2m", "dpm++_2m_sde", "euler", "euler_a", "heun", "unipc"])
def test_a_step_with_the_true_noise_predicts_the_clean_latents(name: str) -> None:
    own = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    scheduler = schedulers.new_scheduler(own, name)
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(1)
    # Small values: some schedulers clip their prediction to [-1, 1].
    clean, noise = (0.3 * torch.randn(2, 4, 8, 8, generator=generator).clamp(-1, 1) for _ in range(2))
    time = scheduler.timesteps[3]
    noisy = scheduler.add_noise(clean, noise, time.reshape(1))
    predicted = predicted_by(scheduler, model_output=noise, timestep=time, sample=noisy)
    assert predicted is not None
    assert torch.allclose(predicted, clean, atol=1e-3)
    assert not torch.allclose(noisy, clean, atol=1e-1)


def test_a_step_of_flow_matching_predicts_the_clean_latents() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    time = scheduler.timesteps[3]
    noisy = scheduler.scale_noise(clean, time.reshape(1), noise)
    predicted = predicted_by(scheduler, model_output=noise - clean, timestep=time, sample=noisy)
    assert predicted is not None
    assert torch.allclose(predicted, clean, atol=1e-4)
