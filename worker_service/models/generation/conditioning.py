"""Converts references for a diffusion pipeline: to an image prompt, an initial image, or words in the prompt."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from shared.errors import ImageGenerationError, ReferenceUnavailableError
from worker_service.models.generation import framing
from worker_service.models.interface import ImageRequest, Reference
from worker_service.models.pipelines.load_pipeline import reference_dim
from worker_service.models.pipelines.placement import device_of

MAX_CAPTIONS = 2
"""More captions move the image away from the prompt. ImageRAG (arXiv 2502.09411) found no gain from more."""


def normalised_weights(request: ImageRequest) -> list[tuple[Reference, float]]:
    """The references of the request's image prompt, with weights that sum to 1; empty in modes without image prompt."""
    if not request.mode.traits.uses_image_prompt:
        return []
    used = [reference for reference in request.references if reference.weight > 0]
    total = sum(reference.weight for reference in used)
    return [(reference, reference.weight / total) for reference in used]


@dataclass(frozen=True)
class ImagePrompt:
    """The references of a whole batch, as the attention layers of an IP-Adapter take them.

    The attention masks carry the weights of the references (`IPAdapterAttnProcessor2_0` of diffusers 0.42.1). Without
    masks, the tokens of all references of a row share one softmax, and a reference has no weight. With masks, the
    processor attends to each reference separately, multiplies each result by the values of its mask, and adds them. So
    every value of a mask is the weight of its reference.

    A row with fewer references than the others is padded with zero vectors of weight 0, which add exactly 0. A row
    without references gives the same image as a pipeline without adapter.
    """

    embeds: torch.Tensor
    """Shape (rows, references, ...). Under guidance twice the rows: first all without images, then all with theirs."""
    masks: torch.Tensor
    """Shape (rows, references, height, width), float32; under guidance twice the rows. Of height and width, only the
    ratio counts."""
    guided: bool
    """Whether the pipeline runs each row twice, for classifier-free guidance."""

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        pipeline: DiffusionPipeline,
        requests: Sequence[ImageRequest],
        *,
        conditions_on: Literal["embedding_space", "image"],
        guided: bool,
        aspect: tuple[int, int],
    ) -> Self:
        """The image prompt of a batch.

        conditions_on: input of the adapter, vectors of the embedding space or images. aspect: (height, width) with the
        aspect ratio of the generated images.

        Raises:
            ReferenceUnavailableError: a reference lacks the vector or the image on which the adapter conditions.
            ImageGenerationError: a vector does not have the length that the adapter takes.
        """
        rows = [normalised_weights(request) for request in requests]
        encoded, blank = _encode(pipeline, [reference for row in rows for reference, _ in row], conditions_on)
        slots = max(1, *map(len, rows))
        conditional = torch.zeros(len(rows), slots, *blank.shape, device=blank.device, dtype=blank.dtype)
        weights = torch.zeros(len(rows), slots, device=blank.device)
        vectors = iter(encoded)
        for row, used in enumerate(rows):
            for slot, (_, weight) in enumerate(used):
                conditional[row, slot] = next(vectors)
                weights[row, slot] = weight
        if guided:
            conditional = torch.cat([blank.expand_as(conditional), conditional])
            weights = torch.cat([weights, weights])
        return cls(conditional, weights[:, :, None, None].repeat(1, 1, *aspect), guided)

    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call. They hold only the first row, which the pipeline repeats for all rows."""
        first = self.embeds[:: len(self.embeds) // 2] if self.guided else self.embeds[:1]
        return {
            "ip_adapter_image_embeds": [first],
            "cross_attention_kwargs": {"ip_adapter_masks": [self.masks]},
        }

    def replace_repeated(self, repeated: torch.Tensor) -> torch.Tensor:
        """Each row's own embeddings, in place of the first row's embeddings that the pipeline has repeated.

        `prepare_ip_adapter_image_embeds` repeats its embeddings once per row. Given the embeddings of n rows, it would
        return n * n, and the attention layers would assign them to the wrong rows without an error.

        Raises:
            ImageGenerationError: the pipeline runs another number of rows.
        """
        if repeated.shape != self.embeds.shape:
            raise ImageGenerationError(
                f"The pipeline runs {repeated.shape[0]} rows, the image prompt has {self.embeds.shape[0]}."
            )
        return self.embeds


def _encode(
    pipeline: DiffusionPipeline, references: Sequence[Reference], conditions_on: Literal["embedding_space", "image"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the references for the adapter, shape (n, ...), and the one that means no image, shape (...)."""
    options = {"device": device_of(pipeline), "dtype": pipeline.unet.dtype}
    dim = reference_dim(pipeline)
    if dim is not None and (conditions_on == "embedding_space" or not references):
        vectors = np.array([_vector(reference, dim) for reference in references], np.float32).reshape(-1, dim)
        return torch.from_numpy(vectors).to(**options), torch.zeros(dim, **options)
    images = [framing.middle_of_long(_image(reference)) for reference in references] or [Image.new("RGB", (64, 64))]
    encoded, blank = pipeline.encode_image(images, options["device"], 1, dim is None)
    return encoded[: len(references)].to(**options), blank[0].to(**options)


def _vector(reference: Reference, dim: int) -> np.ndarray:
    if reference.vector is None:
        raise ReferenceUnavailableError("A reference has no vector, and this model conditions on vectors.")
    if reference.vector.shape != (dim,):
        raise ImageGenerationError(
            f"The references' vectors have shape {reference.vector.shape}, the model's IP-Adapter takes ({dim},): "
            "`conditions_on` is `embedding_space`, but the retrieval CLIP is not the adapter's encoder."
        )
    return reference.vector


def _image(reference: Reference) -> Image.Image:
    if reference.image is None:
        raise ReferenceUnavailableError("A reference has no image, and this model conditions on images.")
    return reference.image.convert("RGB")


def initial_image(request: ImageRequest) -> Image.Image:
    """The image from which img2img starts: the reference with the highest weight, whole and in its own ratio.

    Raises:
        ReferenceUnavailableError: the request has no reference, or this reference has no image.
    """
    if not request.references:
        raise ReferenceUnavailableError(f"Mode {request.mode.value!r} needs a reference to start from.")
    top = max(request.references, key=lambda reference: reference.weight)
    drawn = (request.width, request.height)
    return framing.initial_image(_image(top), drawn, request.output_size or drawn)


class Reader(Protocol):
    """How much of a text a model reads."""

    def unread(self, text: str, /) -> str:
        """The end of a text that the model does not read; empty when it reads all of it."""


def with_captions(request: ImageRequest, reader: Reader) -> tuple[str, list[str]]:
    """The prompt, followed by captions where the mode needs them; and the captions that the model could not read.

    The captions are those of the references with the highest weights. A caption whose words the text already contains
    is left out. So is one beyond the text that the model reads, because half a caption may mean something else.
    """
    if not request.mode.traits.needs_captions:
        return request.prompt, []
    parts, left_out = [request.prompt], list[str]()
    for reference in sorted(request.references, key=lambda reference: -reference.weight):
        caption = (reference.caption or "").strip()
        if not caption or any(_contains_words(part, caption) for part in parts):
            continue
        if reader.unread(", ".join([*parts, caption])):
            left_out.append(caption)
            continue
        parts.append(caption)
        if len(parts) > MAX_CAPTIONS:
            break
    return ", ".join(parts), left_out


def _contains_words(text: str, phrase: str) -> bool:
    """Whether the words of the phrase follow each other in the text: "caterpillar" does not contain "cat"."""
    return f" {_words(phrase)} " in f" {_words(text)} "


def _words(text: str) -> str:
    """The words in one form, with one space between them. A text without letters and digits counts as one word."""
    plain = unicodedata.normalize("NFC", text).casefold()
    return " ".join(re.findall(r"\w+", plain)) or plain
