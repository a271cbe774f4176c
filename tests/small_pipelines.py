"""Small models of the real classes with random weights, saved in the layout of a model hub.

They generate noise. Prompt, seed, references and adapters all change that noise, and the tests compare it.
"""

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

import open_clip
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
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
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)

CLIP_DIM = 24
"""Length of the retrieval CLIP's vectors, which are the input of the SD 1.5 adapter."""
IMAGE_ENCODER_DIM = 20
"""Length of the image encoder's vectors, which are the input of the SDXL adapter."""


def save_clip(folder: Path, *, seed: int = 0, dim: int = CLIP_DIM) -> None:
    """Save an open_clip model, for the name `local-dir:<folder>`."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(context=24)
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
        tokenizer=clip_tokenizer(),
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
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
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
        tokenizer=clip_tokenizer(),
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


def save_flux2_klein(folder: Path, *, distilled: bool = True, kv: bool = False, seed: int = 0) -> None:
    """Save a Flux2KleinPipeline of 256 x 256 pixels, whose latents are packed and normalised by statistics of the VAE.

    distilled: False for klein Base, which takes guidance. kv: a Flux2KleinKVPipeline.
    """
    torch.manual_seed(seed)
    pipeline_class = Flux2KleinKVPipeline if kv else Flux2KleinPipeline
    pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_flux2_vae(),
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(**_language_model(layers=27), max_position_embeddings=1024, tie_word_embeddings=True)
        ),
        tokenizer=chat_tokenizer(),
        transformer=_flux2_transformer(guidance_embeds=False),
        is_distilled=distilled,
    ).save_pretrained(folder)


def save_flux2_dev(folder: Path, *, seed: int = 0) -> None:
    """Save a Flux2Pipeline of 256 x 256 pixels, whose `tokenizer` is a processor of texts and images."""
    torch.manual_seed(seed)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config=MistralConfig(**_language_model(layers=30), max_position_embeddings=1024),
                vision_config=PixtralVisionConfig(**vision, head_dim=8, image_size=64, patch_size=16),
                image_token_index=chat_tokenizer().convert_tokens_to_ids("[IMG]"),
            )
        ),
        tokenizer=PixtralProcessor(
            image_processor=PixtralImageProcessor(), tokenizer=chat_tokenizer(), chat_template=CHAT_TEMPLATE
        ),
        transformer=_flux2_transformer(guidance_embeds=True),
    ).save_pretrained(folder)


def save_flux_dev(folder: Path, *, seed: int = 0) -> None:
    """Save a guidance-distilled FluxPipeline of 256 x 256 pixels, whose T5 reads more tokens than its CLIP."""
    torch.manual_seed(seed)
    FluxPipeline(**_flux_parts()).save_pretrained(folder)


def save_kontext(folder: Path, *, seed: int = 0) -> None:
    """Save a FluxKontextPipeline, which fits every size to an area unless the call says otherwise."""
    torch.manual_seed(seed)
    FluxKontextPipeline(**_flux_parts()).save_pretrained(folder)


def save_chroma(folder: Path, *, seed: int = 0) -> None:
    """Save a ChromaPipeline: FLUX with real guidance and without CLIP."""
    torch.manual_seed(seed)
    ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_packed_vae(),
        text_encoder=_t5_encoder(),
        tokenizer=_t5_tokenizer(),
        transformer=_amplified(
            ChromaTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 4, 8),
                approximator_num_channels=16,
                approximator_hidden_dim=16,
                approximator_layers=1,
            )
        ),
    ).save_pretrained(folder)


def save_sd3(folder: Path, *, seed: int = 0) -> None:
    """Save a StableDiffusion3Pipeline of 64 x 64 pixels. Its T5 reads more tokens than its two CLIPs."""
    torch.manual_seed(seed)
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_packed_vae(block_out_channels=[8, 16, 16, 16]),
        text_encoder=CLIPTextModelWithProjection(_clip_text(32, projection_dim=16)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_text(32, projection_dim=16)),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5_encoder(width=64),
        tokenizer_3=_t5_tokenizer(),
        transformer=_amplified(
            SD3Transformer2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=64,
                caption_projection_dim=32,
                pooled_projection_dim=32,
                pos_embed_max_size=64,
            )
        ),
    ).save_pretrained(folder)


def save_qwen_image(folder: Path, *, seed: int = 0) -> None:
    """Save a QwenImagePipeline of 256 x 256 pixels: true guidance, and a VAE with three-dimensional convolutions."""
    torch.manual_seed(seed)
    parts = _qwen_image_parts()
    del parts["processor"]
    QwenImagePipeline(**parts).save_pretrained(folder)


def save_qwen_image_edit(folder: Path, *, plus: bool = False, seed: int = 0) -> None:
    """Save a QwenImageEditPipeline, which needs a reference. plus: a QwenImageEditPlusPipeline, which takes several."""
    torch.manual_seed(seed)
    pipeline_class = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    # These pipelines enlarge every reference to a megapixel.
    pipeline_class(**_qwen_image_parts() | {"vae": _qwen_vae(scale_factor=8)}).save_pretrained(folder)


def save_qwen_image_21(folder: Path, *, seed: int = 0) -> None:
    """Save a QwenImage21Pipeline, which draws RGBA and takes references or none."""
    torch.manual_seed(seed)
    width = 16
    QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_contrasting(
            AutoencoderKLQwenImage21(
                base_dim=8,
                decoder_base_dim=8,
                z_dim=width,
                dim_mult=[1, 1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[0.1] * width,
                latents_std=[1.5] * width,
            )
        ),
        text_encoder=Qwen3VLForConditionalGeneration(_qwen3_vl()),
        processor=_qwen3_vl_processor(),
        transformer=_amplified(
            QwenImage21Transformer2DModel(
                in_channels=width,
                out_channels=width,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                context_in_dim=16,
                axes_dims_rope=(4, 4, 8),
            )
        ),
    ).save_pretrained(folder)


def save_krea2(folder: Path, *, distilled: bool = False, seed: int = 0) -> None:
    """Save a Krea2Pipeline. Its guidance is on above 0, and its size is in the signature of its call."""
    torch.manual_seed(seed)
    Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_qwen_vae(),
        text_encoder=Qwen3VLModel(_qwen3_vl()),
        tokenizer=chat_tokenizer(),
        transformer=_amplified(
            Krea2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=32,
                timestep_embed_dim=16,
                text_hidden_dim=16,
                num_text_layers=2,
                text_num_attention_heads=2,
                text_num_key_value_heads=1,
                text_intermediate_size=16,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=(4, 4, 8),
            )
        ),
        text_encoder_select_layers=(1, 2),
        is_distilled=distilled,
    ).save_pretrained(folder)


def save_joyimage_edit_plus(folder: Path, *, seed: int = 0) -> None:
    """Save a JoyImageEditPlusPipeline, which takes each row's own list of references."""
    torch.manual_seed(seed)
    processor = _qwen3_vl_processor()
    JoyImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_contrasting(
            AutoencoderKLWan(
                base_dim=8,
                z_dim=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
            )
        ),
        text_encoder=Qwen3VLForConditionalGeneration(_qwen3_vl()),
        tokenizer=processor.tokenizer,
        transformer=_amplified(
            JoyImageEditPlusTransformer3DModel(
                hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=1, rope_dim_list=[4, 6, 6]
            )
        ),
        processor=processor,
    ).save_pretrained(folder)


def save_z_image(folder: Path, *, seed: int = 0) -> None:
    """Save a ZImagePipeline. Its guidance is on above 0, and no part names its size."""
    torch.manual_seed(seed)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_packed_vae(),
        text_encoder=Qwen3Model(Qwen3Config(**_language_model(layers=2), max_position_embeddings=1024)),
        tokenizer=chat_tokenizer(),
        transformer=_amplified(
            ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=16,
                axes_dims=[4, 4, 8],
                axes_lens=[1024, 256, 256],
            )
        ),
    ).save_pretrained(folder)


def save_lumina2(folder: Path, *, seed: int = 0) -> None:
    """Save a Lumina2Pipeline of 64 x 64 pixels."""
    torch.manual_seed(seed)
    Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_packed_vae(block_out_channels=[8, 16, 16, 16]),
        text_encoder=_gemma(),
        tokenizer=_gemma_tokenizer(),
        transformer=_amplified(
            Lumina2Transformer2DModel(
                sample_size=8,
                in_channels=4,
                hidden_size=32,
                num_layers=1,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=16,
                axes_dim_rope=(4, 4, 8),
                axes_lens=(1024, 64, 64),
                cap_feat_dim=16,
            )
        ),
    ).save_pretrained(folder)


def save_sana(folder: Path, *, seed: int = 0) -> None:
    """Save a SanaPipeline of 64 x 64 pixels, a flow model with a scheduler for diffusion models."""
    torch.manual_seed(seed)
    SanaPipeline(
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, algorithm_type="dpmsolver++"
        ),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8,) * 6,
            decoder_block_out_channels=(8,) * 6,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6,
            scaling_factor=0.41,
        ),
        text_encoder=_gemma(),
        tokenizer=_gemma_tokenizer(),
        transformer=_amplified(
            SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=1,
                num_cross_attention_heads=2,
                cross_attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=16,
                sample_size=2,
            )
        ),
    ).save_pretrained(folder)


def save_pixart_sigma(folder: Path, *, seed: int = 0) -> None:
    """Save a PixArtSigmaPipeline, whose call cannot be stopped between two steps."""
    torch.manual_seed(seed)
    PixArtSigmaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5_encoder(),
        vae=_vae(),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            num_layers=1,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=8,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)


def _flux_parts() -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": _packed_vae(),
        "text_encoder": CLIPTextModel(_clip_text(32)),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": _t5_encoder(),
        "tokenizer_2": _t5_tokenizer(),
        "transformer": _amplified(
            FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=True,
            )
        ),
    }


def _qwen_image_parts() -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": _qwen_vae(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=_multimodal_language_model(),
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "out_hidden_size": 16,
                },
                **_vision_tokens(),
            )
        ),
        "tokenizer": chat_tokenizer(),
        "processor": Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56),
            tokenizer=chat_tokenizer(),
            video_processor=Qwen2VLVideoProcessor(),
            chat_template=CHAT_TEMPLATE,
        ),
        "transformer": _amplified(
            QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(4, 4, 8),
            )
        ),
    }


def _qwen3_vl() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config=_multimodal_language_model(),
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_vision_tokens(),
    )


def _qwen3_vl_processor() -> Qwen3VLProcessor:
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=16, min_pixels=64 * 64, max_pixels=64 * 64, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=chat_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def _multimodal_language_model() -> dict[str, Any]:
    return {
        **_language_model(layers=2),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
    }


def _vision_tokens() -> dict[str, int]:
    tokenizer = chat_tokenizer()
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _qwen_vae(*, scale_factor: Literal[2, 8] = 2) -> AutoencoderKLQwenImage:
    return _contrasting(
        AutoencoderKLQwenImage(
            base_dim=8 if scale_factor == 2 else 4,
            z_dim=4,
            dim_mult=[1, 2] if scale_factor == 2 else [1, 1, 1, 2],
            num_res_blocks=1,
            temperal_downsample=[False] if scale_factor == 2 else [False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 1.0, 2.0, 0.5],
        )
    )


def _contrasting(vae: ModuleT) -> ModuleT:
    with torch.no_grad():
        vae.get_parameter("decoder.conv_out.weight").mul_(4)  # as in `_vae`
    return vae


def _packed_vae(**overrides: Any) -> AutoencoderKL:
    options: dict[str, Any] = {
        "block_out_channels": [8, 16],
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.01,
    } | overrides
    blocks = len(options["block_out_channels"])
    return _vae(
        down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks, **options
    )


def _t5_encoder(width: int = 32) -> T5EncoderModel:
    config = T5Config(
        vocab_size=300, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, tie_word_embeddings=False
    )
    return T5EncoderModel(config)


def _gemma() -> Gemma2Model:
    config = _language_model(layers=2) | {"vocab_size": len(_gemma_tokenizer())}
    return Gemma2Model(Gemma2Config(**config, query_pre_attn_scalar=8))


def _gemma_tokenizer() -> GemmaTokenizer:
    """A tokenizer of single letters, without merges."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;'\"()-<>\n"
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    return GemmaTokenizer({piece: i for i, piece in enumerate(pieces)}, [], model_max_length=1024)


def _flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=256,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.bn.running_mean.normal_(std=0.5)
        vae.bn.running_var.uniform_(0.5, 2)
        vae.decoder.conv_out.weight *= 2
    return vae


def _flux2_transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return _amplified(transformer)


def _language_model(*, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(chat_tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
    }


def _amplified(model: ModuleT) -> ModuleT:
    """The model with larger weights in its matrices: small random ones make its attention nearly uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.5)
    return model


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
    vocabulary = len(clip_tokenizer())
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


def clip_tokenizer(context: int = 77) -> CLIPTokenizer:
    """A tokenizer of single bytes, without merges."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, [], model_max_length=context)


CHAT_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    *("<|video_pad|>", "<image1>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '[IMG]' }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of single bytes with the special tokens of chats, without merges."""
    vocabulary = [*sorted(ByteLevel.alphabet()), *CHAT_TOKENS]
    return Qwen2Tokenizer(
        {token: i for i, token in enumerate(vocabulary)},
        [],
        extra_special_tokens=CHAT_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


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
