"""Where the weights of a pipeline are: on its device, or in the memory of the CPU until they are used."""

from typing import Literal

import torch
from diffusers import DiffusionPipeline

Offload = Literal["none", "model", "group"]


def place(pipeline: DiffusionPipeline, device: torch.device, offload: Offload) -> None:
    """Move the pipeline to its device, or arrange for its parts to be moved there when they are used.

    A part is a whole model, such as the text encoder (`model`), or a layer (`group`). Neither changes an image. On a
    CPU neither has an effect.
    """
    match offload:
        case "none":
            pipeline.remove_all_hooks()
            pipeline.to(device)
        case "model":
            pipeline.enable_model_cpu_offload(device=device)
        case "group":
            pipeline.enable_group_offload(
                onload_device=device,
                # Groups of blocks leave the methods of a VAE out, which are not its `forward`.
                offload_type="leaf_level",
                # The next layer is copied while the current one computes.
                use_stream=device.type == "cuda",
                exclude_modules=pipeline._exclude_from_cpu_offload,
            )


def device_of(pipeline: DiffusionPipeline) -> torch.device:
    """The device on which the pipeline computes. Weights that wait for their use are elsewhere."""
    device: torch.device = pipeline._execution_device
    return torch.device("cpu") if device.type == "cpu" else device  # an offloaded pipeline names it cpu:0


def after_failed_call(pipeline: DiffusionPipeline) -> None:
    """Move parts back that the failed call has left on the device. A call that succeeds does it itself."""
    pipeline.maybe_free_model_hooks()
