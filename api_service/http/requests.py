"""Parses a request's path, query, JSON body and form into contracts.

It is stricter than flask_openapi3, which reads malformed JSON as null and a form's "123" as a number. flask_openapi3
also accepts any content type, and takes the first value of a repeated parameter.
"""

import types
from typing import Any, TypeVar, Union, get_args, get_origin

import pydantic
from flask import Request
from pydantic import BaseModel
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType

from api_service.http import problems
from shared.errors import MalformedBodyError

Model = TypeVar("Model", bound=BaseModel)


def parse_path(model: type[Model], values: dict[str, Any]) -> Model:
    return _validate(model, values, where="path")


def parse_query(model: type[Model], request: Request) -> Model:
    return _validate(model, field_values(model, request.args, where="query"), where="query")


def parse_json_body(model: type[Model], request: Request) -> Model:
    """Parse a JSON body strictly: the number 3 is not the string "3".

    Raises:
        UnsupportedMediaType: the `Content-Type` is not JSON.
        RequestEntityTooLarge: the body is larger than `api.max_body_bytes`.
        MalformedBodyError: the body is empty or not valid JSON.
        ValidationError: the JSON does not match the contract.
    """
    if not request.is_json:
        raise UnsupportedMediaType("The body must be JSON, sent with Content-Type: application/json.")
    data = request.get_data()
    if request.content_length is None and len(data) == request.max_content_length:
        # Werkzeug cuts a chunked body at the limit without an error.
        raise RequestEntityTooLarge
    if not data:
        raise MalformedBodyError("The body is empty.")
    try:
        return model.model_validate_json(data, strict=True)
    except pydantic.ValidationError as error:
        raise problems.validation_error(error, where="body") from None


def parse_form(model: type[Model], values: dict[str, Any]) -> Model:
    return _validate(model, values, where="form")


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
