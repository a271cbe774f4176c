"""Write trained models as folders for the normal loaders of open_clip and diffusers, as float16 safetensors."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from starter.train.adapter import split_adapter
from starter.train.clip import MEAN, STD, ClipShape
from starter.train.generator import GeneratorStage, sampling_scheduler


def to_float16(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().to(torch.float16).contiguous() for key, value in state.items()}


def export_clip(model: nn.Module, shape: ClipShape, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": shape.open_clip_config(len(tokenizer)),
        "preprocess_cfg": {
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "resize_mode": "longest",
            "fill_color": 255,
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(to_float16(dict(model.state_dict())), folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(str(folder))


def export_generator(stage: GeneratorStage, folder: Path) -> None:
    """Write a StableDiffusionPipeline folder that also has `ip_adapter/ip_adapter.safetensors`.

    The weights are the stage's running average; the text encoder is the CLIP's text tower.
    """
    plain_state, adapter_state = split_adapter(stage.average, stage.unet)
    plain = UNet2DConditionModel(**plain_config(stage.unet))
    plain.load_state_dict(plain_state)
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(stage.autoencoder),
        text_encoder=copy.deepcopy(stage.text_encoder),
        tokenizer=stage.tokenizer,
        unet=plain,
        scheduler=sampling_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    (folder / "ip_adapter").mkdir(exist_ok=True)
    save_file(to_float16(adapter_state), folder / "ip_adapter" / "ip_adapter.safetensors")


def plain_config(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Return the configuration of the UNet without its adapter."""
    own = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    return {**own, "encoder_hid_dim_type": None}


def replace_folder(new: Path, target: Path) -> None:
    """Replace the folder `target` by `new` with renames, so that it is never half-written."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
