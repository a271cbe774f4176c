"""Weights in one file: a checkpoint with all parts, the denoiser alone, and files that are refused."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from shared.errors import ModelLoadError
from shared.settings import GeneratorSettings
from tests import small_pipelines
from tests.unit.test_diffusion_batches import REQUEST
from tests.unit.test_diffusion_loading import load
from worker_service.models.generation.diffusion import Diffusion

Loaded = Callable[[str], Diffusion]
Tensors = dict[str, torch.Tensor]

UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    # two levels with one layer each
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0": "output_blocks.1.2",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = {
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"encoder\.down_blocks\.(\d)\.resnets": r"encoder.down.\1.block",
    r"encoder\.down_blocks\.(\d)\.downsamplers\.0": r"encoder.down.\1.downsample",
    r"decoder\.up_blocks\.(\d)\.resnets": r"decoder.up.\1.block",
    r"decoder\.up_blocks\.(\d)\.upsamplers\.0": r"decoder.up.\1.upsample",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    r"to_out\.0": "proj_out",
}


def as_checkpoint(pipeline: Path) -> Tensors:
    """The weights of the small SD 1.5 with the names of the original program, in which checkpoints are published."""
    checkpoint: Tensors = {}
    for name, tensor in load_file(pipeline / "unet/diffusion_pytorch_model.safetensors").items():
        place = next(place for place in UNET_NAMES if name.startswith(f"{place}."))
        rest = name.removeprefix(place)
        if ".resnets." in name:
            rest = re.sub(r"^\.(\w+)", lambda match: f".{RESNET_NAMES[match[1]]}", rest)
        checkpoint[f"model.diffusion_model.{UNET_NAMES[place]}{rest}"] = tensor
    for name, tensor in load_file(pipeline / "vae/diffusion_pytorch_model.safetensors").items():
        renamed = name
        for place, original in VAE_NAMES.items():
            renamed = re.sub(place, original, renamed)
        renamed = re.sub(r"decoder\.up\.(\d)", lambda level: f"decoder.up.{3 - int(level[1])}", renamed)
        is_convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", renamed)
        checkpoint[f"first_stage_model.{renamed}"] = tensor[:, :, None, None] if is_convolution else tensor
    for name, tensor in load_file(pipeline / "text_encoder/model.safetensors").items():
        checkpoint[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return checkpoint


def without_weights(pipeline: Path, folder: Path) -> Path:
    shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def draw(model: Diffusion) -> np.ndarray:
    return model.draw([REQUEST], lambda step, steps: True)


def test_a_checkpoint_with_all_parts_draws_like_its_pipeline(
    loaded: Loaded, small_models: Path, tmp_path: Path
) -> None:
    folder = without_weights(small_models / "sd15", tmp_path / "configuration")
    save_file(as_checkpoint(small_models / "sd15"), tmp_path / "model.safetensors")
    model = load(source=str(folder), single_file=str(tmp_path / "model.safetensors"))
    assert np.abs(draw(model) - draw(loaded("sd15_plain"))).max() == 0
    first = model.capabilities.weights_digest
    save_file(
        as_checkpoint(small_models / "sd15") | {"first_stage_model.x": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    assert (
        load(source=str(folder), single_file=str(tmp_path / "model.safetensors")).capabilities.weights_digest != first
    )


@pytest.mark.parametrize(("pipeline", "part"), [("sd15", "unet"), ("flux", "transformer")])
def test_a_denoiser_in_one_file_replaces_that_of_the_source(
    loaded: Loaded, small_models: Path, tmp_path: Path, pipeline: str, part: str
) -> None:
    shutil.copytree(small_models / pipeline, tmp_path / "source")
    weights = tmp_path / "source" / part / "diffusion_pytorch_model.safetensors"
    shutil.move(weights, tmp_path / "denoiser.safetensors")
    model = load(source=str(tmp_path / "source"), single_file=str(tmp_path / "denoiser.safetensors"))
    original = loaded("sd15_plain" if pipeline == "sd15" else pipeline)
    assert np.abs(draw(model) - draw(original)).max() == 0
    assert model.capabilities.weights_digest != original.capabilities.weights_digest


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model"])
def test_a_file_that_may_contain_code_is_refused(small_models: Path, name: str) -> None:
    with pytest.raises(ValidationError, match="safetensors"):
        GeneratorSettings(source=str(small_models / "sd15"), single_file=f"/models/{name}")


def test_a_checkpoint_as_source_is_refused_with_the_setting_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="single_file"):
        GeneratorSettings(source=str(tmp_path / "model.safetensors"))


def test_a_missing_or_broken_file_is_one_line(small_models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    torch.save({}, broken)
    for file, cause in [(tmp_path / "missing.safetensors", "there is no file"), (broken, "broken.safetensors")]:
        with pytest.raises(ModelLoadError, match=cause) as refused:
            load(source=str(small_models / "sd15"), single_file=str(file))
        assert "\n" not in refused.value.message


def test_a_file_without_the_weights_of_the_denoiser_is_one_line_that_names_it(tmp_path: Path) -> None:
    small_pipelines.save_flux2_klein(tmp_path)
    other = tmp_path / "text_encoder" / "model.safetensors"
    with pytest.raises(ModelLoadError, match=f"Weights of Flux2Transformer2DModel in '{other}' could not be loaded"):
        load(source=str(tmp_path), single_file=str(other))
