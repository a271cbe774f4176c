"""Quantized weights: smaller, nearly the same images, and one line where a library or a part is missing.

diffusers quantizes with bitsandbytes on a GPU only.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from shared.errors import ModelLoadError
from shared.settings import ModelSettings, QuantizationSettings
from tests.unit.test_diffusion_batches import REQUEST
from tests.unit.test_diffusion_loading import load
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.pipelines import quantization

Loaded = Callable[[str], Diffusion]


def draw(model: Diffusion) -> np.ndarray:
    return model.draw([REQUEST], lambda step, steps: True)


def size_bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of the tensors of which a quantized one consists."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(size_bytes(parameter) for parameter in module.parameters())


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.02), ("float8", 0.15)])
@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_torchao_needs_less_memory_for_nearly_the_same_image(
    loaded: Loaded, model_settings: ModelSettings, kind: str, tolerance: float, offload: str
) -> None:
    pytest.importorskip("torchao")
    plain = loaded("flux")
    settings = {"backend": "torchao", "type": kind, "components": ["transformer", "text_encoder_2"]}
    source = model_settings.generators["flux"].source
    model = load(source=source, quantization=settings, offload=offload)
    assert model.capabilities.dtype == f"float32, {kind} (torchao)"
    assert model.capabilities.weights_digest == plain.capabilities.weights_digest
    for part in ("transformer", "text_encoder_2"):
        full = weight_bytes(getattr(plain.text_to_image, part))
        assert weight_bytes(getattr(model.text_to_image, part)) < 0.65 * full
    difference = np.abs(draw(model) - draw(plain)).max()
    assert 0 < difference < tolerance


def test_only_the_denoiser_is_quantized_unless_the_settings_name_parts(model_settings: ModelSettings) -> None:
    pytest.importorskip("torchao")
    quantized = {"backend": "torchao", "type": "int8"}
    pipeline = load(**model_settings.generators["sd15_plain"].model_dump() | {"quantization": quantized}).text_to_image
    assert type(pipeline.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight).__name__ == "Int8Tensor"
    assert type(pipeline.text_encoder.encoder.layers[0].mlp.fc1.weight) is torch.nn.Parameter


def test_a_denoiser_in_one_file_is_not_left_unquantized_in_silence(small_models: Path) -> None:
    pytest.importorskip("torchao")
    file = small_models / "flux/transformer/diffusion_pytorch_model.safetensors"
    common = {"source": str(small_models / "flux"), "single_file": str(file)}
    with pytest.raises(ModelLoadError, match="GGUF files have quantized ones"):
        load(**common, quantization={"backend": "torchao", "type": "int8"})
    other_part = {"backend": "torchao", "type": "int8", "components": ["text_encoder_2"]}
    pipeline = load(**common, quantization=other_part).text_to_image
    assert type(pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight).__name__ == "Int8Tensor"


def test_a_gguf_file_has_the_weights_of_the_denoiser(loaded: Loaded, small_models: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    shutil.copytree(small_models / "flux", tmp_path / "flux")
    weights = tmp_path / "flux/transformer/diffusion_pytorch_model.safetensors"
    writer = gguf.GGUFWriter(tmp_path / "flux-q8.gguf", arch="flux")
    for name, tensor in load_file(weights).items():
        divisible = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if divisible else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    full = weights.stat().st_size
    weights.unlink()
    model = load(source=str(tmp_path / "flux"), single_file=str(tmp_path / "flux-q8.gguf"))
    assert model.capabilities.dtype == "float32, gguf"
    assert weight_bytes(model.text_to_image.transformer) < 0.6 * full
    difference = np.abs(draw(model) - draw(loaded("flux"))).max()
    assert 0 < difference < 0.02


def test_a_missing_library_is_one_line_that_names_the_extra() -> None:
    with pytest.raises(ModelLoadError, match=r"pip install '\.\[no_such_library\]'") as refused:
        quantization.require("no_such_library")
    assert "\n" not in refused.value.message


def test_an_adapter_for_a_quantized_denoiser_is_refused(model_settings: ModelSettings) -> None:
    pytest.importorskip("torchao")
    quantized = {"backend": "torchao", "type": "int8"}
    with pytest.raises(ModelLoadError, match="takes no IP-Adapter") as refused:
        load(**model_settings.generators["sd15"].model_dump() | {"quantization": quantized})
    assert "\n" not in refused.value.message


def test_a_part_that_the_pipeline_does_not_have_is_one_line(model_settings: ModelSettings) -> None:
    pytest.importorskip("torchao")
    settings = {"backend": "torchao", "type": "int8", "components": ["transfomer"]}
    with pytest.raises(ModelLoadError, match=r"has no transfomer, but .*transformer") as refused:
        load(source=model_settings.generators["flux"].source, quantization=settings)
    assert "\n" not in refused.value.message


def test_a_type_that_the_library_does_not_have_is_refused() -> None:
    with pytest.raises(ValidationError, match="torchao has the types int8, float8"):
        QuantizationSettings(backend="torchao", type="nf4")
