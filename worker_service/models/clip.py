"""The retrieval model: CLIP, loaded with open_clip, embeds texts and images in one space."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
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
from worker_service.models.generation.framing import middle_of_long

ImageInput: TypeAlias = Image.Image | torch.Tensor
"""An image, or the tensor that `Clip.prepare` returns for it."""
Item = TypeVar("Item", str, ImageInput)

TOKENIZER_PROBE_TEXT = "A photo of 2 red apples; naïve café, Tokyo's 東京!"


@dataclass
class Clip:
    """A loaded CLIP model.

    On a CPU, any number of threads may use it at once. The tokenizer has a lock, because it is not thread-safe.
    """

    name: str
    weights_digest: str
    """sha256 of the weights in float32. It does not depend on `dtype`."""
    preprocess_digest: str
    """sha256 of the settings that resize and normalise images, and of the tokens of a probe text."""
    dim: int
    device: torch.device
    dtype: torch.dtype
    max_batch_size: int
    model: Any
    preprocess: Any
    tokenizer: Any
    _tokenizer_lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(cls, settings: ModelSettings) -> Self:
        """Load the model of `settings.clip` with open_clip.

        Raises:
            ModelLoadError: the model cannot be loaded; the message gives the cause.
        """
        clip = settings.clip
        loading.prepare_process(settings)
        device = loading.resolve_device(clip.device)
        dtype = loading.resolve_dtype(clip.dtype, device)
        with loading.readable_load_errors("CLIP", clip.model.removeprefix("local-dir:"), offline=settings.offline):
            # Without weights, create_model_and_transforms would continue with random ones; this raises an error.
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
            name=_space_name(clip),
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
        """Identity of the embedding space: vectors are comparable if, and only if, their digests are equal."""
        return hashlib.sha256(f"{self.weights_digest} {self.preprocess_digest}".encode()).hexdigest()

    def warm_up(self) -> None:
        """Make the slow first calls, so that no job has to."""
        self.encode_text(["warm up"])
        self.encode_image([Image.new("RGB", (64, 64))])

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Projections of the texts, not normalised: shape (n, dim), float32.

        A text that is longer than the context of the model gets the mean of its parts: see `parts_of_text`.

        Raises:
            EmbeddingError: the model returned a vector that is zero or not finite.
            ModelOutOfMemoryError: a batch does not fit in memory.
        """
        parts = [self.parts_of_text(text) for text in texts]
        vectors = self._in_batches(
            [part for of_text in parts for part in of_text],
            lambda batch: self.model.encode_text(self._tokens(batch).to(self.device)),
        )
        return mean_of_parts(parts, vectors)

    def parts_of_text(self, text: str) -> list[str]:
        """The text, or its halves or quarters and so on, until each part fits in the context of the model. Thread-safe.

        The text is divided between words where it has several.
        """
        if len(text) < 2 or not self._divides_texts or self._fits(text):
            return [text]
        middle = len(text) // 2
        spaces = (found.start() for found in re.finditer(r"\s", text) if 0 < found.start() < len(text) - 1)
        cut = min(spaces, key=lambda space: abs(space - middle), default=middle)
        return [*self.parts_of_text(text[:cut].strip()), *self.parts_of_text(text[cut:].strip())]

    @cached_property
    def _divides_texts(self) -> bool:
        """Whether `_fits` works. It does not for a tokenizer that puts a token behind the padding."""
        return self._fits("a")

    def _fits(self, text: str) -> bool:
        """Whether the tokenizer cuts off nothing. A cut shows when there is room for one token more."""
        context: int = self.tokenizer.context_length
        with self._tokenizer_lock:
            (tokens,), (more, empty) = self.tokenizer([text]), self.tokenizer([text, ""], context + 1)
        return bool((more[:-1] == tokens).all() and more[-1] == empty[-1])

    def _tokens(self, texts: list[str]) -> torch.Tensor:
        with self._tokenizer_lock:
            tokens: torch.Tensor = self.tokenizer(texts)
        return tokens

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Pixels of an image as the model takes them: shape (3, height, width), float32. Thread-safe.

        Raises:
            EmbeddingError: the model's preprocessing cannot take the image.
        """
        try:
            return cast(torch.Tensor, self.preprocess(middle_of_long(image).convert("RGB")))
        except (ValueError, ArithmeticError) as error:  # but not MemoryError, which may be temporary
            raise EmbeddingError("The embedding model cannot take this image.") from error

    def encode_image(self, images: Sequence[ImageInput]) -> np.ndarray:
        """Projections of the images, not normalised: shape (n, dim), float32.

        Raises:
            EmbeddingError: the model returned a vector that is zero or not finite, or cannot take an image.
            ModelOutOfMemoryError: a batch does not fit in memory.
        """

        def encode(batch: list[ImageInput]) -> torch.Tensor:
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
            raise EmbeddingError("The embedding model returned values that are not finite numbers.")
        if not vectors.any(axis=1).all():
            raise EmbeddingError("The embedding model returned a vector of length 0.")
        return vectors

    @staticmethod
    def _on_cpu(encode: Callable[[list[Item]], torch.Tensor], batch: list[Item]) -> np.ndarray:
        vectors: np.ndarray = encode(batch).float().cpu().numpy()
        return vectors


def mean_of_parts(parts: Sequence[Sequence[str]], vectors: np.ndarray) -> np.ndarray:
    """One vector per text: the mean of the vectors of its parts, weighted by their length in characters.

    parts: the parts of each text. vectors: of all parts in this order, shape (n, dim).
    """
    ends = np.cumsum([len(of_text) for of_text in parts])
    means = [
        np.average(of_text, axis=0, weights=[len(part) for part in parts[row]]) if len(parts[row]) > 1 else of_text[0]
        for row, of_text in enumerate(np.split(vectors, ends[:-1]))
        if len(of_text)
    ]
    return np.array(means, np.float32).reshape(len(parts), vectors.shape[1])


def _space_name(settings: ClipSettings) -> str:
    """Name of the embedding space, without the path of a local folder."""
    schema, identifier = open_clip.factory.parse_model_name(settings.model)
    if schema == "local-dir":
        return Path(identifier).name
    return f"{identifier}/{settings.pretrained}" if settings.pretrained else identifier


def _preprocess_digest(model: Any, tokenizer: Any) -> str:
    """sha256 of the image settings and of tokens of a probe text. Tokenizer files differ between library versions."""
    digest = hashlib.sha256(json.dumps(model.visual.preprocess_cfg, sort_keys=True).encode())
    digest.update(tokenizer([TOKENIZER_PROBE_TEXT]).numpy().tobytes())
    return digest.hexdigest()
