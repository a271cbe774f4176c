"""The autoencoder of the generator: an `AutoencoderKLFlux2` with 16 pixels per token, trained on scenes."""

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn
from torch.nn import functional as F

from starter.data.corpus import IMAGE_PX, Sample
from starter.train.dataset import to_unit
from starter.train.optimizer import MuonWithAdamW, Optimizer, adamw, has_bfloat16
from starter.train.scenes import FULL_SIDE, HALF_SIDE, SceneMaker

LATENT_CHANNELS = 24
PATCH = 2
TOKEN_CHANNELS = LATENT_CHANNELS * PATCH**2
TOKEN_PX = 16
CROP_PX = 64
"""The model has no attention, so it can learn from crops, which cost a quarter of a whole picture."""


def build_autoencoder() -> AutoencoderKLFlux2:
    """Build an untrained autoencoder. Its encoder is narrow, because each training scene is encoded once."""
    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 48, 64),
        decoder_block_out_channels=(24, 48, 80, 112),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_PX,
        mid_block_add_attention=False,
        batch_norm_momentum=0.01,
    )


def to_tokens(latents: Tensor) -> Tensor:
    """Pack latents (B, C, H, W) as Flux2KleinPipeline does: (B, C * 4, H / 2, W / 2)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // PATCH, width // PATCH)


def from_tokens(tokens: Tensor) -> Tensor:
    """Undo `to_tokens`."""
    batch, channels, height, width = tokens.shape
    patches = tokens.reshape(batch, channels // PATCH**2, PATCH, PATCH, height, width)
    return patches.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * PATCH, width * PATCH)


@torch.no_grad()
def encode(autoencoder: AutoencoderKLFlux2, images: Tensor) -> Tensor:
    """Return normalised tokens (B, TOKEN_CHANNELS, S / 16, S / 16) of images in [-1, 1]."""
    tokens = to_tokens(autoencoder.encode(images).latent_dist.mode())
    norm = autoencoder.bn
    mean, variance = norm.running_mean, norm.running_var
    normalised: Tensor = (tokens - mean.view(1, -1, 1, 1)) / torch.sqrt(variance.view(1, -1, 1, 1) + norm.eps)
    return normalised


@torch.no_grad()
def decode(autoencoder: AutoencoderKLFlux2, tokens: Tensor) -> Tensor:
    """Undo `encode`."""
    norm = autoencoder.bn
    mean, variance = norm.running_mean, norm.running_var
    plain = tokens * torch.sqrt(variance.view(1, -1, 1, 1) + norm.eps) + mean.view(1, -1, 1, 1)
    decoded: Tensor = autoencoder.decode(from_tokens(plain)).sample
    return decoded


def edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """Return the L1 loss of horizontal and vertical pixel differences, which keeps outlines sharp."""
    difference = a - b
    across = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    return across + down


class AutoencoderStage:
    """Loss: L1, squared error and edges on crops, a small KL term, and noise on the latents for a robust decoder."""

    name = "autoencoder"
    weight_decay = 0.0
    betas = (0.9, 0.99)

    def __init__(
        self,
        samples: list[Sample],
        *,
        batch: int = 16,
        learning_rate: float = 1e-3,
        noise: float = 0.1,
        kl_weight: float = 1e-4,
    ) -> None:
        autoencoder = build_autoencoder().to(memory_format=torch.channels_last)
        self.autoencoder = autoencoder
        self.module: nn.Module = autoencoder
        self.scenes = SceneMaker(samples)
        self.batch = batch
        self.learning_rate = learning_rate
        self.noise = noise
        self.kl_weight = kl_weight

    def optimizer(self) -> Optimizer:
        choice = MuonWithAdamW if has_bfloat16() else adamw
        return choice(self.module, learning_rate=self.learning_rate, weight_decay=self.weight_decay, betas=self.betas)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        images = self.crops(random.Random(int(torch.randint(2**31, ()).item())))
        latents = self.autoencoder.encode(images).latent_dist.mean
        self.autoencoder.bn(to_tokens(latents.detach()))  # only counts the mean and the variance for `encode`
        scale = latents.detach().std()
        noisy = latents + self.noise * scale * torch.randn_like(latents)
        decoded = self.autoencoder.decode(noisy).sample.float()
        squared = F.mse_loss(decoded, images)
        size = 0.5 * latents.pow(2).mean()
        loss = F.l1_loss(decoded, images) + 2 * squared + 0.5 * edge_loss(decoded, images) + self.kl_weight * size
        return loss, {"psnr": psnr(squared).item(), "latent_std": scale.item()}

    def crops(self, rng: random.Random) -> Tensor:
        """Return (B, 3, CROP_PX, CROP_PX) in [-1, 1]: crops of scenes on the token grid, and whole small drawings."""
        crops: list[npt.NDArray[np.uint8]] = []
        while len(crops) < self.batch:
            if rng.random() < 0.25:
                image = rng.choice(self.scenes.images_of[rng.choice(self.scenes.concepts)])
                crops.append(self.scenes.samples[image].pixels(CROP_PX))
                continue
            count = rng.choice((1, 2, 3))  # without references, most pictures are plain
            side = FULL_SIDE if rng.random() < 0.5 else HALF_SIDE
            picture = np.asarray(self.scenes.scene(rng, references=count, side=side).picture)
            for _ in range(2):
                left, top = (TOKEN_PX * rng.randint(0, (IMAGE_PX - CROP_PX) // TOKEN_PX) for _ in range(2))
                crops.append(picture[top : top + CROP_PX, left : left + CROP_PX])
        pixels = torch.from_numpy(np.stack(crops[: self.batch]).transpose(0, 3, 1, 2).copy())
        return recolour(to_unit(pixels))

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
