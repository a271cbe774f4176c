"""Write a trained CLIP as a folder for the normal loader of open_clip, as float16 safetensors."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from starter.train.clip import MEAN, STD, ClipShape


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
