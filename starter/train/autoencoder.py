"""The autoencoder: 64 x 64 x 3 pixels to 16 x 16 x 4 latents and back, an `AutoencoderTiny` that halves twice."""

from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from starter.train.dataset import Dataset, jitter, to_unit
from starter.train.optimizer import Optimizer, adamw

LATENT_CHANNELS = 4
DOWNSCALE = 4


def build_autoencoder(channels: int = 64) -> AutoencoderTiny:
    """Build an untrained autoencoder with two halvings.

    All layers have `channels` channels. It has few blocks at full resolution, where they cost the most.
    """
    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 3,
        decoder_block_out_channels=(channels,) * 3,
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


def reconstruct(autoencoder: AutoencoderTiny, images: Tensor, *, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return reconstructions and latents of images in [-1, 1]. noise: standard deviation, added to the latents."""
    latents: Tensor = autoencoder.encode(images).latents
    noisy = latents + noise * torch.randn_like(latents) if noise else latents
    decoded: Tensor = autoencoder.decode(noisy).sample
    return decoded, latents


def edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """Return the L1 loss of horizontal and vertical pixel differences, which keeps outlines sharp."""
    difference = a - b
    across = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    return across + down


class AutoencoderStage:
    """Loss: L1, squared error and edges on augmented drawings, and mean 0, deviation 1 for each latent channel.

    Noise on the latents makes the decoder robust against errors of the generator.
    """

    name = "autoencoder"
    weight_decay = 0.0
    betas = (0.9, 0.99)

    def __init__(
        self,
        dataset: Dataset,
        *,
        channels: int = 64,
        batch: int = 16,
        learning_rate: float = 1e-3,
        noise: float = 0.05,
    ) -> None:
        self.module: nn.Module = build_autoencoder(channels).to(memory_format=torch.channels_last)
        self.learning_rate = learning_rate
        self.batch = batch
        self.noise = noise
        self.pixels = dataset.pixels[~dataset.held_out]

    def optimizer(self) -> Optimizer:
        return adamw(self.module, learning_rate=self.learning_rate, weight_decay=self.weight_decay, betas=self.betas)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.randint(len(self.pixels), (self.batch,))
        images = recolour(jitter(to_unit(self.pixels[chosen]), scale=0.25))
        decoded, latents = reconstruct(self.module, images, noise=self.noise)
        decoded, latents = decoded.float(), latents.float()
        squared = F.mse_loss(decoded, images)
        spread, centre = torch.std_mean(latents, dim=(0, 2, 3))
        size = ((spread - 1).pow(2) + centre.pow(2)).mean()
        loss = F.l1_loss(decoded, images) + 2 * squared + 0.5 * edge_loss(decoded, images) + 0.05 * size
        return loss, {"psnr": psnr(squared).item(), "latent_std": spread.mean().item()}

    def after_step(self, step: int) -> None:
        return None

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB for images in [-1, 1]."""
    return 10 * torch.log10(4 / mean_squared_error.clamp(min=1e-10))


def recolour(images: Tensor) -> Tensor:
    """Flip half of the images, and permute the colour channels of 30 %, so that the model does not prefer a palette."""
    batch = images.shape[0]
    flipped = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, images.flip(3), images)
    order = torch.randperm(3)
    swapped = torch.where(torch.rand(batch, 1, 1, 1) < 0.3, flipped[:, order], flipped)
    return swapped.contiguous(memory_format=torch.channels_last)
