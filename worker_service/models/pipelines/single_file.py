"""Weights in one file, as they are published for other programs: a whole checkpoint, or the denoiser alone."""

from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from safetensors import safe_open

from shared.errors import ModelLoadError
from shared.settings import GeneratorSettings
from worker_service.models import loading
from worker_service.models.pipelines import quantization

DECODER = "first_stage_model."
"""Prefix of the VAE's tensors in a checkpoint that holds all parts of a pipeline."""


def holds_all_parts(file: Path) -> bool:
    """Whether a checkpoint has the weights of all parts. False: it has those of the denoiser.

    Raises:
        ModelLoadError: there is no such file.
        SafetensorError: it is another kind of file.
    """
    if not file.is_file():
        raise ModelLoadError(f"single_file: there is no file {str(file)!r}.")
    if file.suffix == ".gguf":
        return False
    with safe_open(file, framework="pt") as tensors:
        return any(name.startswith(DECODER) for name in tensors.keys())  # noqa: SIM118, it is no mapping


def load(settings: GeneratorSettings, file: Path, *, options: dict[str, Any]) -> DiffusionPipeline | dict[str, Any]:
    """The pipeline from a checkpoint with all parts, or else the denoiser, by the name that the pipeline gives it.

    The configuration comes from `settings.source`. options: as for `from_pretrained`.

    Raises:
        ModelLoadError: diffusers does not load this class from one file, or the file does not hold its weights.
    """
    places = {name: options[name] for name in ("revision", "local_files_only")}
    model_index = DiffusionPipeline.load_config(settings.source, **places)
    part = denoiser_name(model_index)
    whole = holds_all_parts(file)
    if settings.quantization is not None and (whole or part in (settings.quantization.components or [part])):
        raise ModelLoadError("quantization: weights of a single_file stay as they are; GGUF files have quantized ones.")
    kind = _loadable(model_index["_class_name"] if whole else model_index[part][1])
    common = {"config": settings.source, "dtype": options["dtype"], **places}
    with loading.readable_load_errors(f"Weights of {kind.__name__} in", str(file)):
        if whole:
            return kind.from_single_file(str(file), **common)
        quantizer = quantization.of_gguf_file(dtype=options["dtype"]) if file.suffix == ".gguf" else None
        return {part: kind.from_single_file(str(file), subfolder=part, quantization_config=quantizer, **common)}


def denoiser_name(parts: Any) -> str:
    """The name of the denoiser among the parts of a pipeline."""
    return "unet" if "unet" in parts else "transformer"


def _loadable(name: str) -> Any:
    kind = getattr(diffusers, name)
    if not hasattr(kind, "from_single_file"):
        raise ModelLoadError(f"single_file: diffusers does not load {name} from one file.")
    return kind
