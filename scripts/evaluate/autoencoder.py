"""How much of a picture survives the generator's autoencoder: the best that any of its images can be."""

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import Image

from scripts.evaluate.metrics import psnr_db
from worker_service.models.diffusion import Diffusion


@torch.no_grad()
def psnr_of_round_trip(model: Diffusion, image: Image.Image) -> float:
    """PSNR in dB between an RGB image at the model's native size and its reconstruction."""
    pipeline, capabilities = model.text_to_image, model.capabilities
    pixels = pipeline.image_processor.preprocess(
        image, height=capabilities.native_height, width=capabilities.native_width
    ).to(pipeline.vae.device, pipeline.vae.dtype)
    latents = retrieve_latents(pipeline.vae.encode(pixels), sample_mode="argmax")
    return psnr_db(_unit(pixels), _unit(pipeline.vae.decode(latents).sample))


def _unit(tensor: torch.Tensor) -> np.ndarray:
    """[-1, 1] -> [0, 1], clipped as pipelines clip what they show."""
    return (tensor.float() / 2 + 0.5).clamp(0, 1).cpu().numpy()
