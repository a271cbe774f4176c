"""Write a model of a known size with random weights: what it needs of memory and time, without its download.

    python -m benchmarks.full_size_models klein /tmp/klein
    python -m benchmarks.full_size_models sdxl /tmp/sdxl --native-px 256

The folder has the layout of a model hub, in bfloat16. It needs 16 GB for `klein` (FLUX.2 klein 4B) and 9 GB for `sdxl`
(SDXL base, with an IP-Adapter and its image encoder). Parts and sizes are those of the published models, and only the
tokenizers are small. The images are noise. Every weight keeps the scale of its input, so that no number overflows.
"""

import argparse
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.small_pipelines import chat_tokenizer, clip_tokenizer

DTYPE = torch.bfloat16
SHARD_BYTES = 2 * 2**30
RANDOM_NUMBERS = 2**25 + 39
"""Numbers that all tensors share. The count is odd, so no two rows of a matrix are equal."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("klein", "sdxl"))
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument(
        "--native-px", type=int, default=1024, help="sdxl: side of its native size, a multiple of 64 (default: 1024)"
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    if arguments.model == "klein":
        save_klein(arguments.folder)
    else:
        save_sdxl(arguments.folder, native_px=arguments.native_px)


def save_klein(folder: Path) -> None:
    """Save FLUX.2 klein 4B: a transformer of 3.9 and a text encoder of 4.0 billion weights."""
    with torch.device("meta"):
        parts = {
            "vae": AutoencoderKLFlux2(),
            "text_encoder": Qwen3ForCausalLM(
                Qwen3Config(
                    hidden_size=2560,
                    intermediate_size=9728,
                    num_hidden_layers=36,
                    num_attention_heads=32,
                    num_key_value_heads=8,
                    head_dim=128,
                    vocab_size=151_936,
                    max_position_embeddings=40_960,
                    rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
                    tie_word_embeddings=True,
                    dtype=DTYPE,
                )
            ),
            "transformer": Flux2Transformer2DModel(
                num_layers=5,
                num_single_layers=20,
                num_attention_heads=24,
                joint_attention_dim=3 * 2560,
                guidance_embeds=False,
            ),
        }
    _save_pipeline(
        folder,
        Flux2KleinPipeline,
        parts,
        tokenizer=chat_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        is_distilled=True,
    )


def save_sdxl(folder: Path, *, native_px: int = 1024) -> None:
    """Save SDXL base with, in the published layout, the IP-Adapter `sdxl_models/ip-adapter_sdxl_vit-h.safetensors`.

    native_px: the size for which the UNet says that it was trained. It changes no weight.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=native_px // 8,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        parts = {
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=1024,
                scaling_factor=0.13025,
                force_upcast=True,
            ),
            "text_encoder": CLIPTextModel(_clip_text(768, layers=12, heads=12, hidden_act="quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(_clip_text(1280, layers=32, heads=20, hidden_act="gelu")),
            "unet": unet,
        }
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=16,
                patch_size=14,
                projection_dim=1024,
                hidden_act="gelu",
                dtype=DTYPE,
            )
        )
    _save_pipeline(
        folder,
        StableDiffusionXLPipeline,
        parts,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    save_part(encoder, folder / "models" / "image_encoder")
    adapter = folder / "sdxl_models" / "ip-adapter_sdxl_vit-h.safetensors"
    adapter.parent.mkdir()
    with torch.device("meta"):
        tensors = _ip_adapter(unet, dim=1024)
    save_file(_random(tensors), adapter)


def _clip_text(width: int, *, layers: int, heads: int, hidden_act: str) -> CLIPTextConfig:
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=hidden_act,
        vocab_size=49_408,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=DTYPE,
    )


def _ip_adapter(unet: UNet2DConditionModel, *, dim: int) -> dict[str, torch.Tensor]:
    """The tensors of a published adapter of four tokens: see `_save_ip_adapter` of `tests.small_pipelines`."""
    width = unet.config.cross_attention_dim
    projection = nn.ModuleDict({"proj": nn.Linear(dim, 4 * width), "norm": nn.LayerNorm(width)})
    tensors = {f"image_proj.{name}": tensor for name, tensor in projection.state_dict().items()}
    cross_attentions = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for position, name in enumerate(cross_attentions):
        out = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * position + 1}.{part}.weight"] = torch.empty(out, width)
    return tensors


def _save_pipeline(folder: Path, kind: Any, parts: Mapping[str, nn.Module], **others: Any) -> None:
    pipeline = kind(**parts, **others)
    pipeline.save_config(folder)
    for name, other in others.items():
        if hasattr(other, "save_pretrained"):
            other.save_pretrained(folder / name)
    for name, part in parts.items():
        save_part(part, folder / name)


def save_part(part: Any, folder: Path) -> None:
    """Save a model whose tensors are on the meta device, with random weights, in shards."""
    if isinstance(part, PreTrainedModel):
        part.config.save_pretrained(folder)
        stem = "model"
    else:
        part.save_config(folder)
        stem = "diffusion_pytorch_model"
    tensors = part.state_dict()
    if getattr(part.config, "tie_word_embeddings", False):
        del tensors["lm_head.weight"]
    shards = list(_shards(tensors))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        save_file(_random(shard), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(map(_size_bytes, tensors.values()))}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _size_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * DTYPE.itemsize


def _shards(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(map(_size_bytes, shard.values())) + _size_bytes(tensor) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _random(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same names and shapes. Those of one dimension are the ones and zeros of a new model."""
    numbers = _random_numbers()
    start = 0
    values = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            one = name.endswith(("weight", "running_var"))
            values[name] = torch.full(tensor.shape, one, dtype=DTYPE if tensor.is_floating_point() else tensor.dtype)
            continue
        end = start + tensor.numel()
        enough = numbers if end <= RANDOM_NUMBERS else numbers.repeat(-(-end // RANDOM_NUMBERS))
        drawn = enough[start:end].reshape(tensor.shape)
        values[name] = drawn * tensor[0].numel() ** -0.5  # the scale of the input stays the scale of the output
        start = end % RANDOM_NUMBERS
    return values


@functools.cache
def _random_numbers() -> torch.Tensor:
    return torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0)).to(DTYPE)


if __name__ == "__main__":
    main()
