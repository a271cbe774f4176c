"""The schedulers a request may choose from: those whose every random number comes from the image's own generator."""

import inspect
from typing import Any

import diffusers
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
"""Name -> class and what it sets on top of the model's own configuration. Not here: DPMSolverSDEScheduler, which draws
its noise from a sampler of its own, one for the whole batch."""


def choices(own: SchedulerMixin) -> list[str]:
    """The names that can stand in for a pipeline's own scheduler: diffusers itself says which are compatible."""
    if not own.has_compatibles:
        return []
    compatible = {scheduler.__name__ for scheduler in own.compatibles}
    return [
        name
        for name, (class_name, changes) in ALLOWED.items()
        if class_name in compatible and _keeps_the_noise(own, class_name, changes)
    ]


def _keeps_the_noise(own: SchedulerMixin, class_name: str, changes: dict[str, Any]) -> bool:
    """Does it start from the noise that the model was trained to start from?

    A model with zero terminal signal-to-noise ratio starts from pure noise. Schedulers that do not know that setting
    drop it and start from a picture's ghost; Karras sigmas stretch to its infinite first sigma and never come back.
    """
    if not own.config.get("rescale_betas_zero_snr"):
        return True
    known = inspect.signature(getattr(diffusers, class_name)).parameters
    return "rescale_betas_zero_snr" in known and not changes.get("use_karras_sigmas")


def fresh(own: SchedulerMixin, name: str | None) -> SchedulerMixin:
    """A new scheduler on the model's noise schedule, of the class `name` stands for, or of its own class.

    Schedulers keep state from step to step and from call to call, so every call gets its own.
    """
    if name is None:
        return type(own).from_config(own.config)
    class_name, changes = ALLOWED[name]
    return getattr(diffusers, class_name).from_config(own.config, **changes)


def refuse_noise_of_its_own(own: SchedulerMixin) -> None:
    """Refuse a scheduler whose noise ignores the images' generators: no image of it could be repeated.

    Raises:
        ModelLoadError: it has its own noise sampler, or is a stochastic flow-matching one.
    """
    if hasattr(own, "noise_sampler") or own.config.get("stochastic_sampling"):
        raise ModelLoadError(
            f"{type(own).__name__} draws noise that the images' seeds do not decide; give the pipeline another one."
        )
