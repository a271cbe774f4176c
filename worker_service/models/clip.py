"""The retrieval model: open_clip."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar, cast

import numpy as np
import open_clip
import torch
from PIL import Image

from shared.errors import EmbeddingError
from shared.settings import ClipSettings, ModelSettings
from worker_service.execution import accelerator
from worker_service.models import loading

Picture: TypeAlias = Image.Image | torch.Tensor
"""An image, or what `Clip.prepare` makes of it."""
Item = TypeVar("Item", str, Picture)

MAX_ASPECT = 32
"""Of an image as a model sees it; beyond, its middle stands for it."""
TOKENIZER_PROBE = "A photo of 2 red apples; naïve café, Tokyo's 東京!"


@dataclass
class Clip:
    """A loaded model that puts texts and images in one space.

    Any number of threads may encode images on a CPU at once. Texts are encoded by one at a time: a tokenizer is not
    thread-safe.
    """

    name: str
    weights_digest: str
    """sha256 of the weights in float32, whatever `dtype` they run in."""
    preprocess_digest: str
    """sha256 of how images are resized and normalised, and texts tokenized."""
    dim: int
    device: torch.device
    dtype: torch.dtype
    max_batch_size: int
    model: Any
    preprocess: Any
    tokenizer: Any

    @classmethod
    def load(cls, settings: ModelSettings) -> Self:
        """Load what `settings.clip` names, with open_clip's own code.

        Raises:
            ModelLoadError: it cannot be loaded; the message says what and why.
        """
        clip = settings.clip
        loading.prepare_process(settings)
        device = loading.resolve_device(clip.device)
        dtype = loading.resolve_dtype(clip.dtype, device)
        with loading.readable_load_errors("CLIP", clip.model.removeprefix("local-dir:"), offline=settings.offline):
            # Unlike create_model_and_transforms, this refuses to go on with random weights where it finds none.
            model, preprocess = open_clip.create_model_from_pretrained(
                clip.model, pretrained=clip.pretrained, precision="fp32", device="cpu"
            )
            tokenizer = open_clip.get_tokenizer(clip.model)
            model.eval()
            digest = loading.weights_digest([("clip", model)])
            preprocess_digest = _preprocess_digest(model, tokenizer)
            model.to(device, dtype)
            with torch.no_grad():
                dim = model.encode_text(tokenizer(["dimension"]).to(device)).shape[1]
        return cls(
            name=_name(clip),
            weights_digest=digest,
            preprocess_digest=preprocess_digest,
            dim=dim,
            device=device,
            dtype=dtype,
            max_batch_size=clip.max_batch_size,
            model=model,
            preprocess=preprocess,
            tokenizer=tokenizer,
        )

    @property
    def space_digest(self) -> str:
        """Identity of the embedding space: vectors are comparable when, and only when, this is equal."""
        return hashlib.sha256(f"{self.weights_digest} {self.preprocess_digest}".encode()).hexdigest()

    def warm_up(self) -> None:
        """Pay the first call's costs before a job does."""
        self.encode_text(["warm up"])
        self.encode_image([Image.new("RGB", (64, 64))])

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Projections of the texts, not normalised: shape (n, dim), float32. What exceeds the context is cut.

        Raises:
            EmbeddingError: the model returned something that is no vector.
            ModelOutOfMemoryError: a batch of that size does not fit.
        """
        return self._in_batches(texts, lambda batch: self.model.encode_text(self.tokenizer(batch).to(self.device)))

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """What the model sees of an image: shape (3, height, width), float32. Any thread may call it.

        Raises:
            EmbeddingError: the preprocessing of this model cannot take it.
        """
        try:
            return cast(torch.Tensor, self.preprocess(_without_far_ends(image).convert("RGB")))
        except (ValueError, ArithmeticError) as error:  # not a lack of memory, which may pass
            raise EmbeddingError("The embedding model cannot be shown this image.") from error

    def encode_image(self, images: Sequence[Picture]) -> np.ndarray:
        """Projections of the images, not normalised: shape (n, dim), float32.

        Raises:
            EmbeddingError: the model returned something that is no vector.
            ModelOutOfMemoryError: a batch of that size does not fit.
        """

        def encode(batch: list[Picture]) -> torch.Tensor:
            pixels = torch.stack([each if isinstance(each, torch.Tensor) else self.prepare(each) for each in batch])
            return cast(torch.Tensor, self.model.encode_image(pixels.to(self.device, self.dtype)))

        return self._in_batches(images, encode)

    @torch.no_grad()
    def _in_batches(self, items: Sequence[Item], encode: Callable[[list[Item]], torch.Tensor]) -> np.ndarray:
        vectors = np.zeros((len(items), self.dim), np.float32)
        for start in range(0, len(items), self.max_batch_size):
            batch = list(items[start : start + self.max_batch_size])
            vectors[start : start + len(batch)] = accelerator.run_on(
                self.device, partial(self._on_cpu, encode, batch), items=len(batch)
            )
        if not np.isfinite(vectors).all():
            raise EmbeddingError("The embedding model returned values that are not numbers.")
        if not vectors.any(axis=1).all():
            raise EmbeddingError("The embedding model returned a vector without a direction.")
        return vectors

    @staticmethod
    def _on_cpu(encode: Callable[[list[Item]], torch.Tensor], batch: list[Item]) -> np.ndarray:
        vectors: np.ndarray = encode(batch).float().cpu().numpy()
        return vectors


def _without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of a strip: scaled to what a model sees, its short side would be less than a pixel."""
    width, height = image.size
    longest = min(width, height) * MAX_ASPECT
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _name(settings: ClipSettings) -> str:
    """How the space is called; not where a folder lies."""
    schema, identifier = open_clip.factory.parse_model_name(settings.model)
    if schema == "local-dir":
        return Path(identifier).name
    return f"{identifier}/{settings.pretrained}" if settings.pretrained else identifier


def _preprocess_digest(model: Any, tokenizer: Any) -> str:
    """The tokenizer counts by what it makes of a probe: its files are written differently by every library version."""
    digest = hashlib.sha256(json.dumps(model.visual.preprocess_cfg, sort_keys=True).encode())
    digest.update(tokenizer([TOKENIZER_PROBE]).numpy().tobytes())
    return digest.hexdigest()
