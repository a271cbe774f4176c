"""Mode `reference`: pipelines that read reference images beside the prompt, by the shape of their call.

The shape is read from the loaded pipeline, never from a model's name. See `CallShape`.
"""

import inspect
import re
import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import isqrt, log, sqrt
from typing import Any, Self

import torch
from cachetools import LRUCache
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image

from shared.concepts import counts_several
from shared.errors import ReferenceUnavailableError
from shared.settings import GeneratorSettings
from worker_service.models.generation import framing
from worker_service.models.interface import ImageRequest, Reference

DEFAULT_SIDE = 512
"""Pixels per side of a packed reference, unless the settings name another. Four references of this side double the
tokens of an image of 1024 x 1024 pixels; four of 1024 pixels make them five times as many."""
CACHED_LATENTS_BYTES = 64 * 2**20
"""Bytes of reference latents that a model keeps on its device: 64 references of 1024 x 1024 pixels in bfloat16."""
SIDE_MULTIPLE = 32
"""Pixels of which pipelines make each side of a reference a multiple. A side of less than half of it becomes 0."""
SMALLEST = sys.float_info.min
NUMBERED_IMAGE = re.compile(r"\{image (\d{1,2})\}")


class CallShape(StrEnum):
    """How a pipeline's call takes its references."""

    PACKED = "packed"
    """The call appends the latents of references to those of the image (FLUX.2). Each row of a call can have its own,
    because the service answers `prepare_image_latents`."""
    FLAT = "flat"
    """`image=[...]`: one list for all images of a call (Qwen-Image-Edit-Plus, Qwen-Image 2.1)."""
    NESTED = "nested"
    """`images=[[...], ...]`: one list for each row (JoyImage-Edit-Plus)."""
    SINGLE = "single"
    """`image=...`: one reference for all images of a call (FLUX.1 Kontext, Qwen-Image-Edit)."""


def call_shape(pipeline: DiffusionPipeline) -> CallShape | None:
    """The shape of the pipeline's call; None when it reads no references.

    An image with a `strength`, a mask or a control net is an initial image or a control image, not a reference.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if not parameters.keys().isdisjoint({"strength", "mask_image", "layers"}):
        return None
    if not hasattr(pipeline, "prepare_latents"):
        return None
    prepared = inspect.signature(pipeline.prepare_latents).parameters
    if "images" in parameters and "reference_images" in prepared:
        return CallShape.NESTED
    if "image" not in parameters or not hasattr(pipeline, "_encode_vae_image"):
        return None
    if hasattr(pipeline, "prepare_image_latents") and hasattr(pipeline, "_prepare_image_ids"):
        return CallShape.PACKED if "attention_kwargs" in parameters else None
    if "images" in prepared:
        return CallShape.FLAT
    return CallShape.SINGLE if "image" in prepared else None


def used_references(request: ImageRequest) -> list[Reference]:
    """The references of a request in mode `reference`, heaviest first; those without a weight are not used."""
    if not request.mode.traits.uses_native_references:
        return []
    return sorted((each for each in request.references if each.weight > 0), key=lambda each: -each.weight)


def in_prompt_order(references: Sequence[Reference], prompt: str) -> list[Reference]:
    """First one reference for each thing, in the order in which the prompt names the things; then the next for each.

    references: heaviest first. They keep this order within a thing, and where their things are not known.
    """
    turns: Counter[str] = Counter()
    places = []
    for each in references:
        thing = each.concepts[0] if each.concepts else ""
        named = re.search(rf"\b{re.escape(thing)}\b", prompt, re.IGNORECASE)  # no `a car` in `a carrot`
        places.append((turns[thing], -1 if named is None else named.start()))
        turns[thing] += 1
    return [each for _, each in sorted(zip(places, references, strict=True), key=lambda pair: pair[0])]


def with_names(prompt: str, references: Sequence[Reference], used: Sequence[Reference], *, name: str) -> str:
    """The prompt with the model's own name of each reference in place of `{image N}`.

    N is the position among the request's references, from 1. Without a used reference there, the text stays.

    used: those of the references that the call gets, in its order. name: such as `image {}`, for the place in the call.
    """
    places = {
        position: place
        for place, one in enumerate(used, start=1)
        for position, each in enumerate(references, start=1)
        if each is one
    }
    return NUMBERED_IMAGE.sub(
        lambda found: name.format(places[int(found[1])]) if int(found[1]) in places else found[0], prompt
    )


def stand_for_several(references: Sequence[Reference]) -> bool:
    """Whether the picture has several things for which they stand: different ones, or a number of one (`two dogs`)."""
    shared_by_all = set.intersection(*(set(each.concepts) for each in references))
    return any(map(counts_several, shared_by_all)) if shared_by_all else len(references) > 1


@dataclass
class NativeReferences:
    """The references of one loaded pipeline: which requests can share a call, and the arguments of that call."""

    shape: CallShape
    max_references: int
    """References per image, at most."""
    side: int | None
    """Pixels per side of a reference; None: the pipeline decides."""
    side_of_several: int | None
    """The same for references that stand for several things."""
    name: str
    """Name of a reference in a prompt, with its place in the call, as the model was trained."""
    weighs: bool
    """Whether the references' weights and `ip_adapter_scale` act on the attention."""
    latents: LRUCache[Hashable, torch.Tensor] = field(
        default_factory=lambda: LRUCache(CACHED_LATENTS_BYTES, getsizeof=lambda latents: latents.nbytes)
    )
    """Latents of references by digest and side: the same corpus images are used again and again."""

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, settings: GeneratorSettings) -> Self | None:
        """The references of this pipeline; None when its call reads none."""
        shape = call_shape(pipeline)
        if shape is None:
            return None
        return cls(
            shape,
            max_references=1 if shape is CallShape.SINGLE else settings.max_references,
            side=_side(pipeline, shape, settings.reference_side),
            side_of_several=_side(pipeline, shape, settings.reference_side_of_several or settings.reference_side),
            name=_name(pipeline, shape),
            weighs=settings.weigh_references and shape is CallShape.PACKED and _attends_with_mask(pipeline),
        )

    def batch_key(self, request: ImageRequest) -> Hashable:
        """Requests with equal keys can share a call.

        Packed: the same number of references of one side. Nested: any references. Otherwise only the images of one
        job, with the same texts and the same references in the same order.
        """
        used = self._used(request)
        if self.shape is CallShape.PACKED:
            return len(used), self.side_of(used) if used else None, self._bias(request) is not None
        if self.shape is CallShape.NESTED or not used:
            return None
        return request.prompt, request.negative_prompt, self.side_of(used), tuple(each.digest for each in used)

    def side_of(self, used: Sequence[Reference]) -> int | None:
        """Pixels per side of each of these references of one image; None: the pipeline decides."""
        return self.side_of_several if stand_for_several(used) else self.side

    def arguments(
        self, pipeline: DiffusionPipeline, requests: Sequence[ImageRequest], arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of a call, changed so that it reads the references of its requests.

        pipeline: the copy of this call. For packed references, this replaces methods of the copy. requests: with equal
        batch keys.

        Raises:
            ReferenceUnavailableError: a reference has no image.
        """
        rows = [self._used(request) for request in requests]
        if not any(rows):
            return arguments
        prompts = [self._with_names(*row) for row in zip(arguments["prompt"], requests, strict=True)]
        arguments = arguments | {"prompt": prompts}
        if self.shape is CallShape.PACKED:
            return arguments | self._packed(pipeline, requests)
        if self.shape is CallShape.NESTED:
            return arguments | {"images": [[_readable(each, self.side) for each in row] for row in rows]}
        # One prompt and many images of it: Qwen-Image-Edit-Plus takes no second prompt.
        texts = {name: arguments[name][0] for name in ("prompt", "negative_prompt") if name in arguments}
        side = self.side_of(rows[0])
        pictures = [_readable(each, side) for each in rows[0]]
        arguments = arguments | texts | {"num_images_per_prompt": len(rows)}
        if self.shape is CallShape.SINGLE:
            return arguments | {"image": pictures[0] if side is None else _of_area(pictures[0], side)}
        return arguments | {"image": pictures} | ({} if side is None else {"output_resolution": side})

    def _with_names(self, prompt: str, request: ImageRequest) -> str:
        return with_names(prompt, request.references, self._used(request), name=self.name)

    def _used(self, request: ImageRequest) -> list[Reference]:
        if self.weighs and request.ip_adapter_scale == 0:
            return []
        return in_prompt_order(used_references(request)[: self.max_references], request.prompt)

    def weights(self, request: ImageRequest) -> list[float] | None:
        """Weight of each used reference in the attention, in the order of the call; None: they only order.

        The heaviest has the weight `ip_adapter_scale`. With 1, a reference acts as in the pipeline's plain call.
        """
        weights = [each.weight for each in self._used(request)]
        return [request.ip_adapter_scale * each / max(weights) for each in weights] if self.weighs else None

    def _bias(self, request: ImageRequest) -> list[float] | None:
        """Terms to add to the attention scores of each reference's tokens; None when all weights are 1.

        Softmax turns log(w) into a factor w of the attention to these tokens. With w near 0, the reference is left out.
        """
        weights = self.weights(request) or []
        # A product of tiny weights and scales may be 0, which has no logarithm.
        return None if all(weight == 1 for weight in weights) else [log(max(weight, SMALLEST)) for weight in weights]

    def record(self, request: ImageRequest) -> dict[str, Any] | None:
        """How the call reads the request's references, for the provenance; None when it reads none.

        order: positions in the request's references. fit: a packed reference lies whole in a square, and the colours
        of its edges fill the space beside it; others keep their ratio, or get the one that their pipeline chooses.
        """
        used = self._used(request)
        if not used:
            return None
        return {
            "shape": self.shape.value,
            "order": [next(i for i, each in enumerate(request.references) if each is one) for one in used],
            "side": self.side_of(used),
            "fit": "pad" if self.shape is CallShape.PACKED else "pipeline",
            "weights": self.weights(request),
        }

    def _packed(self, pipeline: DiffusionPipeline, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        """Arguments for references of their own in each row.

        The pipeline encodes one list of images and repeats it for all rows. Its copy gets each row's own latents
        instead. All references are squares of one side, because the transformer reads the positions of the first row
        alone (`Flux2Transformer2DModel.forward` of diffusers 0.42.1).
        """
        rows = [self._used(request) for request in requests]
        side = self.side_of(rows[0])
        assert side is not None, "packed references have a side"
        biases = [self._bias(request) for request in requests]
        attention: dict[str, torch.Tensor] = {}
        text_tokens = 0
        encode_prompt = pipeline.encode_prompt

        def recording_encode_prompt(*args: Any, **kwargs: Any) -> Any:
            nonlocal text_tokens
            encoded = encode_prompt(*args, **kwargs)
            text_tokens = encoded[0].shape[1]
            return encoded

        def prepare_image_latents(
            images: object, batch_size: int, generator: object, device: torch.device, dtype: torch.dtype
        ) -> tuple[torch.Tensor, torch.Tensor]:
            encoded = [[self._encoded(pipeline, each, side, dtype) for each in row] for row in rows]
            ids = pipeline._prepare_image_ids(encoded[0]).repeat(len(rows), 1, 1).to(device)
            tokens = torch.cat(
                [torch.cat([pipeline._pack_latents(each) for each in row], dim=1) for row in encoded]
            ).to(device)
            if biases[0] is not None:
                own = tokens.shape[1] // len(rows[0])
                multiple = pipeline.image_processor.config.vae_scale_factor
                image_tokens = (requests[0].height // multiple) * (requests[0].width // multiple)
                mask = torch.zeros(len(rows), 1, 1, text_tokens + image_tokens + tokens.shape[1])
                for row, bias in zip(mask, biases, strict=True):
                    row[..., text_tokens + image_tokens :] = torch.tensor(bias).repeat_interleave(own)
                attention["attention_mask"] = mask.to(device, pipeline.transformer.dtype)
            return tokens, ids

        pipeline.encode_prompt = recording_encode_prompt
        pipeline.prepare_image_latents = prepare_image_latents
        # The pipeline checks and scales these images, then gives them to `prepare_image_latents`, which ignores them.
        blank = [Image.new("RGB", (64, 64))] * len(rows[0])
        return {"image": blank, "attention_kwargs": attention}

    def _encoded(
        self, pipeline: DiffusionPipeline, reference: Reference, side: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Latents of one reference: shape (1, channels, side, side)."""
        # The memory saver that decodes in tiles also encodes in tiles, which changes the latents slightly.
        key = reference.digest, side, getattr(pipeline.vae, "use_tiling", False)
        if (kept := self.latents.get(key)) is not None:
            return kept
        square = framing.initial_image(_picture(reference), (side, side), (side, side))
        pixels = pipeline.image_processor.preprocess(square, height=side, width=side)
        on_device = pixels.to(get_module_execution_device(pipeline.vae), dtype)
        latents: torch.Tensor = pipeline._encode_vae_image(image=on_device, generator=None)
        if latents.nbytes <= self.latents.maxsize:
            self.latents[key] = latents
        return latents


def _name(pipeline: DiffusionPipeline, shape: CallShape) -> str:
    """A format of the number. The pipelines of the flat shape number the references in their own prompt templates."""
    if shape is CallShape.SINGLE:
        return "the image"
    if shape is CallShape.FLAT:
        return "<image{}>" if "<image1>" in getattr(pipeline, "prompt_template_ti2i", "") else "Picture {}"
    return "image {}"


def _side(pipeline: DiffusionPipeline, shape: CallShape, wanted: int | None) -> int | None:
    """Pixels per side of a reference: as wanted, or else a default; None where the call takes no size."""
    if shape is CallShape.PACKED:
        multiple: int = pipeline.image_processor.config.vae_scale_factor
        return max(1, (wanted or DEFAULT_SIDE) // multiple) * multiple
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "output_resolution" in parameters:
        return max(SIDE_MULTIPLE, wanted or int(parameters["output_resolution"].default))
    if "_auto_resize" in parameters and "max_area" in parameters:
        return max(SIDE_MULTIPLE, wanted or isqrt(parameters["max_area"].default))
    return None


def _attends_with_mask(pipeline: DiffusionPipeline) -> bool:
    """Whether all attention of the transformer adds a mask. Processors that keep the keys of references drop it."""
    return all(
        "attention_mask" in parameters and "kv_cache" not in parameters
        for processor in pipeline.transformer.attn_processors.values()
        for parameters in [inspect.signature(processor.__call__).parameters]
    )


def _picture(reference: Reference) -> Image.Image:
    if reference.image is None:
        raise ReferenceUnavailableError("A reference has no image, and this mode reads images.")
    return reference.image.convert("RGB")


def _readable(reference: Reference, side: int | None) -> Image.Image:
    """The picture, or its middle if it is too long for a pipeline that keeps its ratio and makes it `side` in area."""
    longest = framing.MAX_ASPECT if side is None else min(framing.MAX_ASPECT, (side // SIDE_MULTIPLE) ** 2)
    return framing.middle_of_long(_picture(reference), longest=longest)


def _of_area(picture: Image.Image, side: int) -> Image.Image:
    """The picture in its own ratio, scaled to about the area of a square of `side`."""
    scale = side / sqrt(picture.width * picture.height)
    return picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
    )
