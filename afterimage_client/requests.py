"""Requests from plain arguments, with references as files, bytes or ids."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pydantic

from afterimage_client.errors import InvalidInputError, describe_fields
from shared.contracts.common import Contract, FieldProblem
from shared.contracts.generation import PinnedReference, RagGenerateRequest, SentReferenceImage
from shared.contracts.images import ImageView

Reference = Path | str | bytes | UUID | ImageView | PinnedReference | SentReferenceImage
"""An image file, by its path or its bytes; or an image of the corpus, by its object or its id."""

Request = TypeVar("Request", bound=Contract)


def build_request(kind: type[Request], **fields: Any) -> Request:
    """Return a request with these fields.

    Raises:
        InvalidInputError: a field is unknown or has an invalid value; `errors` lists them all.
    """
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        problems = [_problem(kind, each["loc"], each["type"], each["msg"]) for each in error.errors()]
        raise InvalidInputError(f"invalid request: {describe_fields(problems)}", problems) from None


def generation_request(prompt: str, *, references: Sequence[Reference] = (), **fields: Any) -> RagGenerateRequest:
    """Return a request for images of a prompt; without references, the service searches some in the corpus.

    Raises:
        InvalidInputError: a field is invalid, or the file of a reference cannot be read.
    """
    named = [reference_of(each) for each in references]
    given = {
        "reference_ids": [each for each in named if isinstance(each, UUID | PinnedReference)],
        "reference_images": [each for each in named if isinstance(each, SentReferenceImage)],
    }
    return build_request(
        RagGenerateRequest, prompt=prompt, **{name: each for name, each in given.items() if each}, **fields
    )


def reference_of(reference: Reference) -> UUID | PinnedReference | SentReferenceImage:
    """Return a reference as a request has it. A text is an id, or else the path of a file.

    Raises:
        InvalidInputError: the file cannot be read.
    """
    if isinstance(reference, UUID | PinnedReference | SentReferenceImage):
        return reference
    if isinstance(reference, ImageView):
        return reference.id
    if isinstance(reference, bytes):
        return SentReferenceImage.of(reference)
    if isinstance(reference, str):
        try:
            return UUID(reference)
        except ValueError:
            pass
    return SentReferenceImage.of(read_file(Path(reference)))


def read_file(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        InvalidInputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}") from error


def _problem(kind: type[Contract], place: tuple[int | str, ...], code: str, message: str) -> FieldProblem:
    name = ".".join(map(str, place))
    if code == "extra_forbidden":
        near = get_close_matches(name, kind.model_fields, n=1)
        message = "there is no such field" + (f"; is {near[0]} meant?" if near else "")
    return FieldProblem(field=name or "request", code=code, message=message.removeprefix("Value error, "))
