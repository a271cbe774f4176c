"""Measure the reconstruction quality of the generator's autoencoder, the upper bound for its images."""

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import Image

from scripts.evaluate.metrics import psnr_db
from worker_service.models.generation.diffusion import Diffusion


@torch.no_grad()
def psnr_of_round_trip(model: Diffusion, image: Image.Image) -> float:
    """Return the PSNR in dB between an RGB image at the model's native size and its reconstruction."""
    pipeline, capabilities = model.text_to_image, model.capabilities
    pixels = pipeline.image_processor.preprocess(
        image, height=capabilities.native_height, width=capabilities.native_width
    ).to(pipeline.vae.device, pipeline.vae.dtype)
    latents = retrieve_latents(pipeline.vae.encode(pixels), sample_mode="argmax")
    return psnr_db(_unit(pixels), _unit(pipeline.vae.decode(latents).sample))


def _unit(tensor: torch.Tensor) -> np.ndarray:
    """Map [-1, 1] to [0, 1] and clip, as pipelines do for their images."""
    return (tensor.float() / 2 + 0.5).clamp(0, 1).cpu().numpy()
