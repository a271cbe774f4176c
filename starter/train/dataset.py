"""The corpus as tensors, and the augmentation of its images."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from starter.data.corpus import CORPUS_FILE, MODEL_PX, Sample, read_corpus


@dataclass(frozen=True)
class Dataset:
    """N images: `pixels` uint8 (N, 3, S, S), `concept` int64 (N,) an index into `names`, `held_out` bool (N,)."""

    samples: list[Sample]
    pixels: Tensor
    concept: Tensor
    names: list[str]
    held_out: Tensor

    @property
    def images_of(self) -> list[list[int]]:
        """The indices of the images of each concept."""
        members: list[list[int]] = [[] for _ in self.names]
        for index, concept in enumerate(self.concept.tolist()):
            members[concept].append(index)
        return members


def load_dataset(path: Path = CORPUS_FILE, *, size: int = MODEL_PX, limit: int | None = None) -> Dataset:
    """Load the corpus, or its first `limit` images, at `size` pixels."""
    samples = list(itertools.islice(read_corpus(path), limit))
    names = list(dict.fromkeys(sample.concept for sample in samples))
    number = {name: index for index, name in enumerate(names)}
    pixels = np.stack([sample.pixels(size) for sample in samples]).transpose(0, 3, 1, 2)
    return Dataset(
        samples=samples,
        pixels=torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.get_default_device()),
        concept=torch.tensor([number[sample.concept] for sample in samples]),
        names=names,
        held_out=torch.tensor([sample.is_held_out for sample in samples]),
    )


def to_unit(pixels: Tensor) -> Tensor:
    """Convert uint8 (B, 3, S, S) to float32 in [-1, 1], channels last, on the default device."""
    return (pixels.to(torch.get_default_device()).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def jitter(
    images: Tensor,
    *,
    shift: float = 0.06,
    scale: float = 0.12,
    degrees: float = 8.0,
    brightness: float = 0.08,
) -> Tensor:
    """Apply small random affine moves and brightness changes; the borders are filled with white (1.0).

    Args:
        images: shape (B, 3, S, S), in [-1, 1].
        shift: fraction of the side.
        scale: 0.12 means 0.88 to 1.12.
        brightness: largest relative change.
    """
    batch = images.shape[0]
    angle = (torch.rand(batch) * 2 - 1) * math.radians(degrees)
    zoom = 1 + (torch.rand(batch) * 2 - 1) * scale
    move = (torch.rand(batch, 2) * 2 - 1) * shift * 2
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], dim=1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = 1 + F.grid_sample(images - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    gain = 1 + (torch.rand(batch, 1, 1, 1) * 2 - 1) * brightness
    return ((moved + 1) * gain - 1).clamp(-1, 1).contiguous(memory_format=torch.channels_last)
