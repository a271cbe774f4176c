"""One image as a call of OpenAI's image API, and the answers of engines as images or errors.

The calls: https://platform.openai.com/docs/api-reference/images. SGLang Diffusion and vLLM-Omni add fields for the
seed, the steps and the guidance, by their names in diffusers.
"""

import base64
import binascii
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import ceil
from typing import Annotated, Any

import httpx
import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from shared.errors import (
    BaseAppException,
    ContentRefusedError,
    EngineRefusedError,
    EngineUnavailableError,
    InvalidOutputError,
    ReferenceUnavailableError,
)
from shared.imaging import DECODER_ERRORS, DECOMPRESSION_BOMBS
from shared.settings import GeneratorSettings
from shared.settings.engines import Parameter
from worker_service.models.generation.conditioning import with_captions
from worker_service.models.generation.native_references import in_prompt_order, used_references, with_names
from worker_service.models.interface import ImageRequest, Reference

GENERATIONS, EDITS = "images/generations", "images/edits"
BUSY = frozenset({429, 502, 503, 504})
"""Statuses of an engine, or of a proxy before it, that takes no call for a while."""
REFUSED = frozenset({400, 413, 415, 422})
"""Statuses that say that the request is wrong, and not the engine, its key or its address."""
CONTENT_CODES = frozenset({"content_policy_violation", "moderation_blocked", "content_filter", "content_refused"})
"""Codes with which engines refuse a prompt, a picture, or the image that they have drawn."""
SAFE_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Call:
    """One call of an engine, for one image."""

    path: str
    fields: Mapping[str, Any]
    pictures: Sequence[bytes] = ()
    """PNG files of the references, in order."""
    picture_field: str = "image"

    def content(self) -> dict[str, Any]:
        """The body, as arguments of a request of httpx: JSON, or a form with files when there are pictures."""
        if not self.pictures:
            return {"json": self.fields}
        files = [
            (self.picture_field, (f"{number}.png", picture, "image/png"))
            for number, picture in enumerate(self.pictures, start=1)
        ]
        return {"data": {name: _form_value(value) for name, value in self.fields.items()}, "files": files}


def _form_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class _ReadsAll:
    """Engines do not say how much of a text their model reads."""

    def unread(self, _text: str) -> str:
        return ""


def call_for(request: ImageRequest, settings: GeneratorSettings) -> Call:
    """The call that draws this image.

    Raises:
        ReferenceUnavailableError: a reference has no picture, and the mode reads pictures.
    """
    engine = settings.engine
    assert engine is not None, "checked by the settings"
    references = references_of(request, settings)
    prompt = with_names(with_captions(request, _ReadsAll())[0], request.references, references, name="image {}")
    values: dict[Parameter, Any] = {
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "negative_prompt": request.negative_prompt or None,
        "response_format": "b64_json",
    }
    fields = {
        "model": engine.model,
        "prompt": prompt,
        "n": 1,
        "size": f"{request.width}x{request.height}",
        **{engine.fields[name]: value for name, value in values.items() if engine.fields[name] and value is not None},
        **engine.extra,
    }
    pictures = [_png(reference, settings.reference_side) for reference in references]
    return Call(EDITS if pictures else GENERATIONS, fields, pictures, engine.image_field)


def references_of(request: ImageRequest, settings: GeneratorSettings) -> list[Reference]:
    """The references whose pictures the call sends, in its order; empty in modes that send none."""
    return in_prompt_order(used_references(request)[: settings.max_references], request.prompt)


def _png(reference: Reference, side: int | None) -> bytes:
    if reference.image is None:
        raise ReferenceUnavailableError("A reference has no image, and this model reads images.")
    picture = reference.image.convert("RGB")
    if side is not None:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


class _Drawn(BaseModel):
    b64_json: str | None = None


class _Answer(BaseModel):
    data: Annotated[list[_Drawn], Field(min_length=1)]


def image_of(body: bytes, *, width: int, height: int) -> np.ndarray:
    """The image in the answer of an engine: uint8, shape (height, width, 3), RGB. Transparent parts are white.

    Raises:
        InvalidOutputError: the answer holds no image of this size; the message says what it holds.
    """
    try:
        drawn = _Answer.model_validate_json(body).data[0].b64_json
    except ValidationError:
        raise InvalidOutputError("The engine's answer is not a JSON object with images in `data`.") from None
    if drawn is None:
        # An address would be fetched from wherever the engine says.
        raise InvalidOutputError("The engine's answer has no image in `b64_json`; addresses of images are not fetched.")
    try:
        with Image.open(io.BytesIO(base64.b64decode(drawn, validate=True)), formats=["PNG", "JPEG", "WEBP"]) as file:
            if file.size != (width, height):
                raise InvalidOutputError(
                    f"The engine returned {file.size[0]} x {file.size[1]} pixels instead of {width} x {height}."
                )
            if not file.has_transparency_data:
                return np.asarray(file.convert("RGB"))
            on_white = Image.new("RGBA", file.size, "white")
            on_white.alpha_composite(file.convert("RGBA"))
            return np.asarray(on_white.convert("RGB"))
    except (binascii.Error, *DECODER_ERRORS, *DECOMPRESSION_BOMBS):
        raise InvalidOutputError("The engine returned bytes that are not a PNG, JPEG or WebP image.") from None


def error_of(status: int, headers: httpx.Headers, body: bytes) -> BaseAppException:
    """The error for an answer other than 200. Its message and its context hold nothing of the engine but its code."""
    code = _code(body)
    if code in CONTENT_CODES:
        return ContentRefusedError(reason=code)
    if status in REFUSED:
        return EngineRefusedError(reason=code) if code else EngineRefusedError()
    message = "The engine is busy." if status in BUSY else f"The engine answered with status {status}."
    return EngineUnavailableError(message, retry_after_s=retry_after_s(headers))


def _code(body: bytes) -> str | None:
    """The code of an error in the form of OpenAI, `{"error": {"code": ...}}`; None without a short text there."""
    try:
        error = json.loads(body)["error"]
        code = error.get("code") or error.get("type")
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return code if isinstance(code, str) and SAFE_CODE.fullmatch(code) else None


def retry_after_s(headers: httpx.Headers) -> int | None:
    """Seconds of the `Retry-After` header, which has seconds or a date; None without one that can be read."""
    header = headers.get("retry-after", "")
    if header.isdecimal():
        return int(header)
    try:
        return max(0, ceil((parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()))
    except (ValueError, TypeError):
        return None
