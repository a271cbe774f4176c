"""Weights in fewer bits: the quantizers of diffusers, as the settings name them."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import diffusers
import torch
import transformers
from diffusers import GGUFQuantizationConfig, PipelineQuantizationConfig

from shared.errors import ModelLoadError
from shared.settings import GeneratorSettings, QuantizationSettings


def require(library: str) -> None:
    """Check that an optional library is installed. The extra that installs it has its name.

    Raises:
        ModelLoadError: it is not; the message names the extra.
    """
    if find_spec(library) is None:
        raise ModelLoadError(f"quantization needs {library}, an optional library: pip install '.[{library}]'")


def of_pipeline(
    settings: QuantizationSettings, model_index: Mapping[str, Any], *, dtype: torch.dtype
) -> PipelineQuantizationConfig:
    """The `quantization_config` of `DiffusionPipeline.from_pretrained`.

    model_index: the parts of the pipeline, by name, each with its library and class. dtype: of the computation.

    Raises:
        ModelLoadError: the library is missing, or the pipeline does not have the parts.
    """
    require(settings.backend)
    known = {name: part[0] for name, part in model_index.items() if isinstance(part, list | tuple)}
    parts = settings.components or [name for name in ("unet", "transformer") if name in known]
    if unknown := sorted(set(parts) - known.keys()):
        raise ModelLoadError(f"quantization: the pipeline has no {', '.join(unknown)}, but {', '.join(sorted(known))}.")
    return PipelineQuantizationConfig(
        quant_mapping={
            part: of_part(settings, transformers if known[part] == "transformers" else diffusers, dtype=dtype)
            for part in parts
        }
    )


def of_part(settings: QuantizationSettings, library: Any, *, dtype: torch.dtype) -> Any:
    """The `quantization_config` of one part. library: diffusers or transformers, which have a class each."""
    require(settings.backend)
    match settings.backend, settings.type:
        case "torchao", _:
            types = import_module("torchao.quantization")  # by name, because the worker image does not contain it
            return library.TorchAoConfig(
                types.Int8WeightOnlyConfig() if settings.type == "int8" else types.Float8WeightOnlyConfig()
            )
        case _, "int8":
            return library.BitsAndBytesConfig(load_in_8bit=True)
        case _:
            return library.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=settings.type, bnb_4bit_compute_dtype=dtype
            )


def of_gguf_file(*, dtype: torch.dtype) -> GGUFQuantizationConfig:
    """The `quantization_config` of `from_single_file` for a GGUF file, whose tensors have their own types.

    Raises:
        ModelLoadError: the library is missing.
    """
    require("gguf")
    return GGUFQuantizationConfig(compute_dtype=dtype)


def describe(settings: GeneratorSettings, dtype: str) -> str:
    """The dtype of a model, for its capabilities: such as "bfloat16, int8 (torchao)"."""
    if settings.single_file is not None and settings.single_file.endswith(".gguf"):
        return f"{dtype}, gguf"
    if settings.quantization is None:
        return dtype
    return f"{dtype}, {settings.quantization.type} ({settings.quantization.backend})"
