"""Loads the diffusers pipeline of a generator, with its adapter and LoRAs, as the settings describe it."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline
from diffusers.loaders import IPAdapterMixin
from diffusers.models.embeddings import ImageProjection
from transformers import CLIPVisionModelWithProjection

from shared.errors import ModelLoadError
from shared.settings import GeneratorSettings, IPAdapterSettings, LoraSettings
from worker_service.models import loading
from worker_service.models.pipelines import denoiser_kernels, placement, quantization, single_file


def load_pipeline(settings: GeneratorSettings, *, offline: bool) -> DiffusionPipeline:
    """Load the pipeline of the settings, with its adapter and LoRAs, onto its device.

    Its class is the text-to-image class of diffusers for these weights, or else the one that `model_index.json` names.
    It reads only safetensors files, and runs no code from the model's repository. offline: use only local files.

    Raises:
        ModelLoadError: a part is missing or does not fit, or the source is not a pipeline.
    """
    diffusers.utils.logging.set_verbosity_error()  # SDXL logs a cast of its VAE in every call
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    device = loading.resolve_device(settings.device)
    dtype = loading.resolve_dtype(settings.dtype, device)
    with loading.readable_load_errors("Pipeline", settings.source, offline=offline):
        pipeline = _load_parts(
            settings,
            revision=settings.revision,
            variant=settings.variant,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=offline,
        )
    if settings.ip_adapter is not None:
        with loading.readable_load_errors("IP-Adapter", settings.ip_adapter.source, offline=offline):
            _load_ip_adapter(pipeline, settings.ip_adapter, offline=offline)
    for name, lora in settings.loras.items():
        with loading.readable_load_errors(f"LoRA {name!r}", lora.source, offline=offline):
            _load_lora(pipeline, name, lora, offline=offline)
    with loading.readable_load_errors(f"Pipeline on {device}", settings.source):
        if settings.offload == "none":
            pipeline.to(device)  # before the next lines, because a GPU is faster at them
        for module in (getattr(pipeline, "unet", None), getattr(pipeline, "vae", None)):
            # PyTorch has this format for images only. The VAEs of Qwen-Image and Wan have 3-D convolutions.
            # Quantized weights have a format of their own.
            if module is not None and not _is_quantized(module) and all(each.ndim <= 4 for each in module.parameters()):
                module.to(memory_format=torch.channels_last)
        pipeline.set_progress_bar_config(disable=True)
        placement.place(pipeline, device, settings.offload)
        denoiser_kernels.choose(pipeline, settings)
    return pipeline


def _is_quantized(module: Any) -> bool:
    return getattr(module, "hf_quantizer", None) is not None


def _load_parts(settings: GeneratorSettings, **options: Any) -> DiffusionPipeline:
    if settings.quantization is not None:
        places = {name: options[name] for name in ("revision", "local_files_only")}
        model_index = DiffusionPipeline.load_config(settings.source, **places)
        quantizers = quantization.of_pipeline(settings.quantization, model_index, dtype=options["dtype"])
        options["quantization_config"] = quantizers
    if settings.single_file is None:
        return _from_pretrained(settings.source, **options)
    with loading.readable_load_errors("File", settings.single_file):
        loaded = single_file.load(settings, Path(settings.single_file), options=options)
    return _from_pretrained(settings.source, **options, **loaded) if isinstance(loaded, dict) else loaded


def _from_pretrained(source: str, **options: Any) -> DiffusionPipeline:
    try:
        return AutoPipelineForText2Image.from_pretrained(source, **options)
    except ValueError:
        # Its table lacks classes that can still draw from text or from references, such as Flux2KleinKVPipeline. If
        # the cause was another one, the second attempt ends with it.
        return DiffusionPipeline.from_pretrained(source, **options)


def image_to_image(pipeline: DiffusionPipeline) -> DiffusionPipeline | None:
    """The image-to-image pipeline of the same parts; None where diffusers has no such pipeline."""
    try:
        sibling = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError:  # diffusers has no such pipeline for this class
        return None
    sibling.set_progress_bar_config(disable=True)
    parameters = inspect.signature(type(sibling).__call__).parameters
    return sibling if {"image", "strength"} <= parameters.keys() else None


def _load_ip_adapter(pipeline: DiffusionPipeline, adapter: IPAdapterSettings, *, offline: bool) -> None:
    if not isinstance(pipeline, IPAdapterMixin):
        # The adapters of FLUX and SD3 take no attention masks, and the weights of the references need these masks.
        raise ModelLoadError(f"{type(pipeline).__name__} supports no IP-Adapter with weighted references.")
    if _is_quantized(pipeline.unet):
        raise ModelLoadError("A quantized UNet takes no IP-Adapter. Name other parts in quantization.components.")
    if not adapter.weight_name.endswith(".safetensors"):
        raise ModelLoadError(f"{adapter.weight_name!r} is not a safetensors file.")
    if adapter.image_encoder_folder is not None:
        # load_ip_adapter would load it too, but from any revision, and from a pickle file if there is one.
        nested = "/" not in adapter.image_encoder_folder
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            adapter.source,
            subfolder=f"{adapter.subfolder}/{adapter.image_encoder_folder}" if nested else adapter.image_encoder_folder,
            revision=adapter.revision,
            dtype=pipeline.dtype,
            use_safetensors=True,
            local_files_only=offline,
        )
        pipeline.register_modules(image_encoder=encoder)
    pipeline.load_ip_adapter(
        adapter.source,
        subfolder=adapter.subfolder,
        weight_name=adapter.weight_name,
        revision=adapter.revision,
        image_encoder_folder=None,
        local_files_only=offline,
    )
    if adapter.conditions_on == "image" and pipeline.image_encoder is None:
        raise ModelLoadError("conditions_on is `image`, but neither adapter nor pipeline has an image encoder.")
    if adapter.conditions_on == "embedding_space" and reference_dim(pipeline) is None:
        raise ModelLoadError("This IP-Adapter takes hidden states, not vectors: `conditions_on` must be `image`.")


def _load_lora(pipeline: DiffusionPipeline, name: str, lora: LoraSettings, *, offline: bool) -> None:
    if lora.weight_name is None and len(files := sorted(Path(lora.source).glob("*.safetensors"))) > 1:
        raise ModelLoadError(f"LoRA {name!r}: weight_name has to be one of {', '.join(file.name for file in files)}.")
    if lora.weight_name is not None and not lora.weight_name.endswith(".safetensors"):
        raise ModelLoadError(f"LoRA {name!r}: {lora.weight_name!r} is not a safetensors file.")
    pipeline.load_lora_weights(
        lora.source,
        revision=lora.revision,
        weight_name=lora.weight_name,
        adapter_name=name,
        use_safetensors=True,
        local_files_only=offline,
    )
    # diffusers passes over weights for parts that the pipeline does not have.
    if not any(name in adapters for adapters in pipeline.get_list_adapters().values()):
        raise ModelLoadError(f"LoRA {name!r} has no weights for {type(pipeline).__name__}.")


def reference_dim(pipeline: DiffusionPipeline) -> int | None:
    """Length of the vector that the pipeline's IP-Adapter takes for an image; None when it takes hidden states."""
    projection = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    return projection.image_embeds.in_features if isinstance(projection, ImageProjection) else None
