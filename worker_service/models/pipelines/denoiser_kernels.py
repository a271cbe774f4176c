"""The kernels of the denoiser: its attention backend, and compilation of its repeated blocks."""

from typing import Any

from diffusers import DiffusionPipeline

from shared.errors import ModelLoadError
from shared.settings import GeneratorSettings


def choose(pipeline: DiffusionPipeline, settings: GeneratorSettings) -> None:
    """Set the attention backend and the compilation of the settings. The first call of each shape compiles.

    Raises:
        ModelLoadError: the denoiser does not have the one or the other.
        RuntimeError: the library of the backend is missing.
    """
    denoiser: Any = getattr(pipeline, "unet", None) or pipeline.transformer
    kind = type(denoiser).__name__
    if settings.attention is not None:
        if not any(hasattr(getattr(part, "processor", None), "_attention_backend") for part in denoiser.modules()):
            raise ModelLoadError(f"attention: {kind} takes no attention backend.")
        denoiser.set_attention_backend(settings.attention)
    if settings.compile == "regional":
        if not getattr(denoiser, "_repeated_blocks", None):
            raise ModelLoadError(f"compile: {kind} names no repeated blocks.")
        denoiser.compile_repeated_blocks()
