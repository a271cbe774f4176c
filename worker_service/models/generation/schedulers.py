"""The schedulers that a request may choose: all of their random numbers come from the image's own generator."""

import inspect
import math
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from shared.errors import ModelLoadError

ALLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""By name: the class of diffusers, and its changes to the model's own scheduler configuration. DPMSolverSDEScheduler is
left out, because it takes its noise from one sampler for the whole batch."""


def compatible_names(own: SchedulerMixin) -> list[str]:
    """Names of the schedulers that can replace a pipeline's own: `compatibles` of diffusers, if they run its model."""
    if not own.has_compatibles:
        return []
    compatible = {scheduler.__name__ for scheduler in own.compatibles}
    return [
        name
        for name, (class_name, changes) in ALLOWED.items()
        if class_name in compatible and _starts_from_right_noise(own, class_name, changes) and _runs(own, name)
    ]


def _runs(own: SchedulerMixin, name: str) -> bool:
    """Whether the scheduler can run the model, by a few steps of one pixel.

    diffusers lists schedulers as compatible that refuse the model's `prediction_type`, or that take flow matching for
    diffusion and end in infinities.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    sample = torch.randn(1, 4, 1, 1, generator=generator)
    try:
        scheduler = new_scheduler(own, name)
        step_takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        scheduler.set_timesteps(3)
        for timestep in scheduler.timesteps:
            output = torch.ones_like(scheduler.scale_model_input(sample, timestep))
            options = {"generator": generator} if step_takes_generator else {}
            sample = scheduler.step(output, timestep, sample, **options).prev_sample
    except Exception:  # most often ValueError; whatever it is, requests cannot choose this scheduler
        return False
    return bool(torch.isfinite(sample).all())


def _starts_from_right_noise(own: SchedulerMixin, class_name: str, changes: dict[str, Any]) -> bool:
    """Whether the scheduler starts from the noise with which the model was trained.

    A model with zero terminal signal-to-noise ratio (`rescale_betas_zero_snr`, arXiv 2305.08891) starts from pure
    noise. Schedulers without that setting ignore it and start from noise that contains a trace of an image. Karras
    sigmas do not work either, because they would stretch to a nearly infinite first sigma.
    """
    if not own.config.get("rescale_betas_zero_snr"):
        return True
    known = inspect.signature(getattr(diffusers, class_name)).parameters
    return "rescale_betas_zero_snr" in known and not changes.get("use_karras_sigmas")


def new_scheduler(own: SchedulerMixin, name: str | None) -> SchedulerMixin:
    """A new scheduler with the model's noise schedule. name: a key of `ALLOWED`; None: the model's own class.

    Schedulers keep state between steps and between calls, so every call gets its own.
    """
    if name is None:
        return type(own).from_config(own.config)
    class_name, changes = ALLOWED[name]
    return getattr(diffusers, class_name).from_config(own.config, **changes)


def most_steps(scheduler: SchedulerMixin) -> int:
    """Most steps that the scheduler takes. Those of consistency models have a second, smaller limit."""
    trained: int = scheduler.config.get("num_train_timesteps", 1000)
    return min(trained, scheduler.config.get("original_inference_steps") or trained)


def img2img_schedule(
    scheduler: SchedulerMixin, steps: int, strength: float, *, all_steps_run: bool
) -> tuple[int, float]:
    """The (num_inference_steps, strength) with which diffusers runs at least one step, and takes the call.

    Most pipelines run the last `int(steps * strength)` steps of the schedule. With few steps and a low strength that
    is 0. The schedule then gets more steps, so that its last one starts at the noise of this strength.

    all_steps_run: the pipeline runs all `steps`, within the last `strength` of the scheduler's own longer schedule.
    """
    most = most_steps(scheduler)
    strength = max(strength, 1 / most)
    if all_steps_run:
        return min(steps, max(1, int(most * strength))), strength
    steps = max(steps, min(most, math.ceil(1 / strength)))
    # 49 * (1 / 49) is below 1 in floating point.
    return steps, strength if int(steps * strength) else math.nextafter(strength, 1)


def require_seeded_noise(own: SchedulerMixin) -> None:
    """Reject a scheduler whose noise does not come from the images' generators: its images could not be replayed.

    Raises:
        ModelLoadError: the scheduler has its own noise sampler, or is a stochastic flow-matching scheduler.
    """
    if hasattr(own, "noise_sampler") or own.config.get("stochastic_sampling"):
        raise ModelLoadError(
            f"The noise of {type(own).__name__} does not depend on the images' seeds; give the pipeline another one."
        )
