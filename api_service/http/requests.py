"""Parses a request's path, query, JSON body and form into contracts.

It is stricter than flask_openapi3, which reads malformed JSON as null and a form's "123" as a number. flask_openapi3
also accepts any content type, and takes the first value of a repeated parameter.
"""

import types
from collections.abc import Iterable
from typing import Any, TypeVar, Union, get_args, get_origin

import pydantic
from flask import Request
from pydantic import BaseModel, TypeAdapter
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType

from api_service.http import problems
from shared.contracts.outputs import RememberRequest
from shared.errors import MalformedBodyError

Model = TypeVar("Model", bound=BaseModel)

OPTIONAL_BODIES = frozenset({RememberRequest})
"""Bodies that may be left out, because each of their fields has a default."""


class UnsupportedContentEncoding(UnsupportedMediaType):
    description = "The body must be sent without Content-Encoding: compressed bodies are not read."
    errors = ({"field": "header.Content-Encoding", "code": "not_supported", "message": "Must be left out."},)

    def get_headers(self, *arguments: Any) -> list[tuple[str, str]]:
        return [*super().get_headers(*arguments), ("Accept-Encoding", "identity")]


def refuse_encoded_body(request: Request) -> None:
    """A small compressed body can become a very large one, so none is read.

    Raises:
        UnsupportedContentEncoding: the body has a `Content-Encoding`.
    """
    encodings = {each.strip().lower() for each in request.headers.get("Content-Encoding", "").split(",")}
    if encodings - {"", "identity"}:
        raise UnsupportedContentEncoding


def parse_path(model: type[Model], values: dict[str, Any]) -> Model:
    return _validate(model, values, where="path")


def parse_query(model: type[Model], request: Request) -> Model:
    values = field_values(model, request.args, where="query")
    # An empty tag is an error: without it, the query would find more than was asked for.
    if all(map(str.strip, values.get("tags", [""]))):
        values["tags"] = split_tags(values["tags"])
    return _validate(model, values, where="query")


def parse_json_body(model: type[Model], request: Request) -> Model:
    """Parse a JSON body strictly: the number 3 is not the string "3".

    Raises:
        UnsupportedMediaType: the `Content-Type` is not JSON.
        RequestEntityTooLarge: the body is larger than `api.max_body_bytes`.
        MalformedBodyError: the body is empty or not valid JSON.
        ValidationError: the JSON does not match the contract.
    """
    if model in OPTIONAL_BODIES and not request.get_data():
        return model()
    if not request.is_json:
        raise UnsupportedMediaType("The body must be JSON, sent with Content-Type: application/json.")
    data = request.get_data()
    if request.content_length is None and len(data) == request.max_content_length:
        # Werkzeug cuts a chunked body at the limit without an error.
        raise RequestEntityTooLarge
    if not data:
        raise MalformedBodyError("The body is empty.")
    return parse_json(model, data)


def parse_json(model: type[Model], data: bytes) -> Model:
    """Parse JSON as strictly as a body.

    Raises:
        MalformedBodyError: the data is not valid JSON.
        ValidationError: the JSON does not match the contract.
    """
    try:
        return model.model_validate_json(data, strict=True)
    except pydantic.ValidationError as error:
        raise problems.validation_error(error, where="body") from None


def parse_form(model: type[Model], values: dict[str, Any]) -> Model:
    return _validate(model, values, where="form")


def split_tags(values: Iterable[str]) -> list[str]:
    """Split each value at its commas; drop empty tags. A JSON array has tags that contain commas."""
    return [tag for value in values for tag in _tags_of(value)]


def _tags_of(value: str) -> list[str]:
    try:
        return TypeAdapter(list[str]).validate_json(value)
    except pydantic.ValidationError:
        return [tag for part in value.split(",") if (tag := part.strip())]


def field_values(model: type[BaseModel], sent: "MultiDict[str, str]", *, where: str) -> dict[str, Any]:
    """Return the sent values by field name: a list for each field that is a list in the contract, else one string.

    Raises:
        ValidationError: a field that is not a list was sent more than once.
    """
    values: dict[str, Any] = {}
    for name, texts in sent.lists():
        if name in model.model_fields and _is_list(model.model_fields[name].annotation):
            values[name] = texts
        elif len(texts) == 1:
            values[name] = texts[0]
        else:
            raise problems.field_error(f"{where}.{name}", "repeated", "Must be given once.")
    return values


def _validate(model: type[Model], values: dict[str, Any], *, where: str) -> Model:
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise problems.validation_error(error, where=where) from None


def _is_list(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return any(map(_is_list, get_args(annotation)))
    return get_origin(annotation) is list
