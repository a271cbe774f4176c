"""Small models of the real classes with random weights, saved in the layout of a model hub.

They generate noise. Prompt, seed, references and adapters all change that noise, and the tests compare it.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_DIM = 24
"""Length of the retrieval CLIP's vectors, which are the input of the SD 1.5 adapter."""
IMAGE_ENCODER_DIM = 20
"""Length of the image encoder's vectors, which are the input of the SDXL adapter."""


def save_clip(folder: Path, *, seed: int = 0, dim: int = CLIP_DIM) -> None:
    """Save an open_clip model, for the name `local-dir:<folder>`."""
    torch.manual_seed(seed)
    tokenizer = _clip_tokenizer(context=24)
    tokenizer.save_pretrained(folder)
    model_cfg: dict[str, Any] = {
        "embed_dim": dim,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {
            "context_length": 24,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "tokenizer",
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    vision = open_clip.CLIPVisionCfg(**model_cfg["vision_cfg"])
    text = open_clip.CLIPTextCfg(**model_cfg["text_cfg"])
    model = open_clip.CLIP(embed_dim=dim, vision_cfg=vision, text_cfg=text)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}})
    )


def save_sd15(folder: Path, *, seed: int = 0, checker_flags: bool | None = None) -> None:
    """Save a StableDiffusionPipeline, with an IP-Adapter in `ip_adapter/` and two LoRAs in `lora/`.

    The adapter takes the vectors of the retrieval CLIP.

    checker_flags: with a safety checker that flags every image (True) or no image (False).
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**_unet(cross_attention_dim=32))
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_text(32)),
        tokenizer=_clip_tokenizer(),
        unet=unet,
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
        safety_checker=None if checker_flags is None else _safety_checker(flags=checker_flags),
        feature_extractor=None if checker_flags is None else CLIPImageProcessor(size=32, crop_size=32),
        requires_safety_checker=checker_flags is not None,
    ).save_pretrained(folder)
    projection = _global_projection(dim=CLIP_DIM, cross_attention_dim=32)
    _save_ip_adapter(folder / "ip_adapter" / "ip_adapter.safetensors", unet, projection)
    _save_lora(folder / "lora", unet)


def save_sdxl(folder: Path, *, turbo: bool = False, seed: int = 0) -> None:
    """Save a StableDiffusionXLPipeline and, in the published layout, two IP-Adapters with one image encoder.

    The encoder is in `models/image_encoder`. `sdxl_models/ip-adapter_sdxl_vit-h.safetensors` takes its vectors, and
    `sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors` takes its hidden states.

    turbo: the one-step sampler of SDXL-Turbo.
    """
    torch.manual_seed(seed)
    projection_dim = 16
    unet = UNet2DConditionModel(
        **_unet(cross_attention_dim=32 + 24),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + projection_dim,
    )
    scheduler = (
        EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
        if turbo
        else DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    )
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_text(32)),
        text_encoder_2=CLIPTextModelWithProjection(_clip_text(24, projection_dim=projection_dim)),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=scheduler,
    ).save_pretrained(folder)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            projection_dim=IMAGE_ENCODER_DIM,
        )
    )
    encoder.save_pretrained(folder / "models" / "image_encoder")
    adapters = folder / "sdxl_models"
    _save_ip_adapter(
        adapters / "ip-adapter_sdxl_vit-h.safetensors",
        unet,
        _global_projection(dim=IMAGE_ENCODER_DIM, cross_attention_dim=32 + 24),
    )
    _save_ip_adapter(
        adapters / "ip-adapter-plus_sdxl_vit-h.safetensors",
        unet,
        _resampler(hidden_dim=32, cross_attention_dim=32 + 24),
    )


def save_flux(folder: Path, *, seed: int = 0) -> None:
    """Save a guidance-distilled FluxPipeline."""
    torch.manual_seed(seed)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(latent_channels=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.01),
        text_encoder=CLIPTextModel(_clip_text(32)),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, tie_word_embeddings=False)
        ),
        tokenizer_2=_t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
    ).save_pretrained(folder)


def _safety_checker(*, flags: bool) -> StableDiffusionSafetyChecker:
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 16}, projection_dim=16)
    checker = StableDiffusionSafetyChecker(config)
    # The weights are its thresholds. A cosine is always above -2 and below 2.
    checker.concept_embeds_weights.data.fill_(-2 if flags else 2)
    checker.special_care_embeds_weights.data.fill_(2)
    return checker


def _vae(**overrides: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        **{
            "block_out_channels": [8, 16, 16, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 64,
        }
        | overrides
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 2  # unscaled random weights give only shades of one grey
    return vae


def _unet(cross_attention_dim: int) -> dict[str, Any]:
    return {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": cross_attention_dim,
        "norm_num_groups": 8,
    }


def _clip_text(width: int, **overrides: Any) -> CLIPTextConfig:
    vocabulary = len(_clip_tokenizer())
    return CLIPTextConfig(
        vocab_size=vocabulary,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        **overrides,
    )


def _clip_tokenizer(context: int = 77) -> CLIPTokenizer:
    """A tokenizer of single bytes, without merges."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, [], model_max_length=context)


def _t5_tokenizer() -> T5Tokenizer:
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in letters)]
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=64)


def _global_projection(*, dim: int, cross_attention_dim: int) -> dict[str, torch.Tensor]:
    """The image projection of a plain IP-Adapter: one vector per image becomes four tokens."""
    linear, norm = nn.Linear(dim, 4 * cross_attention_dim), nn.LayerNorm(cross_attention_dim)
    return _named("proj", linear) | _named("norm", norm)


def _resampler(*, hidden_dim: int, cross_attention_dim: int) -> dict[str, torch.Tensor]:
    """The image projection of an IP-Adapter Plus: four learned queries attend to the encoder's hidden states."""
    inner = 64
    tensors = {
        "latents": torch.randn(1, 4, inner),
        **_named("proj_in", nn.Linear(hidden_dim, inner)),
        **_named("proj_out", nn.Linear(inner, cross_attention_dim)),
        **_named("norm_out", nn.LayerNorm(cross_attention_dim)),
    }
    for layer in range(4):  # the only depth that diffusers supports
        parts = {
            "0.norm1": nn.LayerNorm(inner),
            "0.norm2": nn.LayerNorm(inner),
            "0.to_q": nn.Linear(inner, inner, bias=False),
            "0.to_kv": nn.Linear(inner, 2 * inner, bias=False),
            "0.to_out": nn.Linear(inner, inner, bias=False),
            "1.0": nn.LayerNorm(inner),
            "1.1": nn.Linear(inner, 4 * inner, bias=False),
            "1.3": nn.Linear(4 * inner, inner, bias=False),
        }
        for name, part in parts.items():
            tensors |= _named(f"layers.{layer}.{name}", part)
    return tensors


def _named(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def _save_ip_adapter(file: Path, unet: UNet2DConditionModel, projection: dict[str, torch.Tensor]) -> None:
    """Save the published layout: `image_proj.*`, and `ip_adapter.{1,3,...}` by order of the cross-attention layers."""
    tensors = {f"image_proj.{name}": tensor for name, tensor in projection.items()}
    cross_attentions = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for position, name in enumerate(cross_attentions):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for part in ("to_k_ip", "to_v_ip"):
            weight = 0.3 * torch.randn(attention.to_q.out_features, unet.config.cross_attention_dim)
            tensors[f"ip_adapter.{2 * position + 1}.{part}.weight"] = weight
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def _save_lora(folder: Path, unet: UNet2DConditionModel) -> None:
    """Save two LoRAs of the UNet's attention, `ink.safetensors` and `neon.safetensors`."""
    for name in ("ink", "neon"):
        unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]), adapter_name=name)
        state = get_peft_model_state_dict(unet, adapter_name=name)
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, weight_name=f"{name}.safetensors")
        unet.delete_adapters(name)
