"""How references reach a diffusion pipeline: as an image prompt, as the initial image, or as words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from shared.contracts.generation import Mode
from shared.errors import ImageGenerationError, ReferenceUnavailableError
from worker_service.models.interface import ImageRequest, Reference
from worker_service.models.load_pipeline import reference_dim

MAX_CAPTIONS = 2
"""More captions than this pull the picture away from the prompt (ImageRAG, arXiv 2502.09411, gains nothing by them)."""


def shares(request: ImageRequest) -> list[tuple[Reference, float]]:
    """The references that form the request's image prompt, with weights that sum to 1; empty in the other modes."""
    if not request.mode.uses_image_prompt:
        return []
    used = [reference for reference in request.references if reference.weight > 0]
    total = sum(reference.weight for reference in used)
    return [(reference, reference.weight / total) for reference in used]


@dataclass(frozen=True)
class ImagePrompt:
    """The references of a whole batch, as the attention layers of an IP-Adapter take them.

    Without masks, the tokens of all references of a row share one softmax, and no reference has a weight of its own.
    With masks, the attention processor attends to each reference apart and adds the results, multiplied by the mask's
    values: so the weights go there, the same on the whole canvas, and a row with fewer references than the others is
    padded with zero vectors of weight 0, which add exactly nothing. A row without references is drawn as if there
    were no adapter. (`IPAdapterAttnProcessor2_0` of diffusers 0.42.1.)
    """

    embeds: torch.Tensor
    """Shape (rows, references, ...); under guidance the rows twice: first as no image, then as they are."""
    masks: torch.Tensor
    """Shape (rows, references, height, width), float32; the height and width are only an aspect ratio."""
    guided: bool

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
        """The image prompt of a batch that runs under classifier-free guidance or not. aspect: (height, width).

        Raises:
            ReferenceUnavailableError: a reference has no vector, or no image, where the adapter conditions on that.
            ImageGenerationError: a vector is not of the length that the adapter takes.
        """
        rows = [shares(request) for request in requests]
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
        """What the pipeline's call is given: the first row alone, because it repeats what it gets for every row."""
        first = self.embeds[:: len(self.embeds) // 2] if self.guided else self.embeds[:1]
        return {
            "ip_adapter_image_embeds": [first],
            "cross_attention_kwargs": {"ip_adapter_masks": [self.masks]},
        }

    def instead_of(self, repeated: torch.Tensor) -> torch.Tensor:
        """The embeddings of every row, in place of those of the first row that the pipeline has repeated.

        `prepare_ip_adapter_image_embeds` repeats the embeddings as often as there are rows, so embeddings for several
        rows come out as their square, and the attention layers deal the tokens out to the wrong rows without a word.

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
    """The references as the adapter wants them, shape (n, ...), and what stands for no image, shape (...)."""
    options = {"device": pipeline.device, "dtype": pipeline.unet.dtype}
    dim = reference_dim(pipeline)
    if dim is not None and (conditions_on == "embedding_space" or not references):
        vectors = np.array([_vector(reference, dim) for reference in references], np.float32).reshape(-1, dim)
        return torch.from_numpy(vectors).to(**options), torch.zeros(dim, **options)
    images = [_image(reference) for reference in references] or [Image.new("RGB", (64, 64))]
    encoded, blank = pipeline.encode_image(images, pipeline.device, 1, dim is None)
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
    """The image of the request's heaviest reference, cut and scaled to the request's size."""
    if not request.references:
        raise ReferenceUnavailableError(f"Mode {request.mode.value!r} needs a reference to start from.")
    top = max(request.references, key=lambda reference: reference.weight)
    return ImageOps.fit(_image(top), (request.width, request.height), Image.Resampling.LANCZOS)


def worded_prompt(request: ImageRequest, tokenizer: Any) -> str:
    """The prompt, followed in caption mode by the captions of the heaviest references, while the tokenizer has room.

    The prompt comes first, because what does not fit is cut from the end. tokenizer: of transformers; none: no limit.
    """
    if request.mode is not Mode.CAPTION:
        return request.prompt
    parts = [request.prompt]
    for reference in sorted(request.references, key=lambda reference: -reference.weight):
        caption = (reference.caption or "").strip()
        if not caption or any(caption.casefold() in part.casefold() for part in parts):
            continue
        longer = ", ".join([*parts, caption])
        if tokenizer is not None and len(tokenizer(longer).input_ids) > tokenizer.model_max_length:
            continue
        parts.append(caption)
        if len(parts) > MAX_CAPTIONS:
            break
    return ", ".join(parts)
