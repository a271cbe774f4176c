"""A request's path, query, JSON body and form, checked against the contracts.

Stricter than flask_openapi3, which reads malformed JSON as null, a form's "123" as a number and a body of any content
type, and takes the first of a parameter given twice.
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


def path(model: type[Model], values: dict[str, Any]) -> Model:
    return _checked(model, values, where="path")


def query(model: type[Model], request: Request) -> Model:
    return _checked(model, fields(model, request.args, where="query"), where="query")


def body(model: type[Model], request: Request) -> Model:
    """A JSON body, read strictly: the number 3 is not the string "3".

    Raises:
        UnsupportedMediaType: the body does not claim to be JSON.
        RequestEntityTooLarge
        MalformedBodyError: it is not JSON.
        ValidationError
    """
    if not request.is_json:
        raise UnsupportedMediaType("The body must be JSON, sent with Content-Type: application/json.")
    data = request.get_data()
    if request.content_length is None and len(data) == request.max_content_length:
        # Werkzeug cuts a chunked body at the limit and says nothing.
        raise RequestEntityTooLarge
    if not data:
        raise MalformedBodyError("The body is empty.")
    try:
        return model.model_validate_json(data, strict=True)
    except pydantic.ValidationError as error:
        raise problems.invalid(error, where="body") from None


def form(model: type[Model], values: dict[str, Any]) -> Model:
    return _checked(model, values, where="form")


def fields(model: type[BaseModel], values: "MultiDict[str, str]", *, where: str) -> dict[str, Any]:
    """What was sent, lists where the model has lists.

    Raises:
        ValidationError: a field that is no list was given more than once.
    """
    found: dict[str, Any] = {}
    for name, given in values.lists():
        if name in model.model_fields and _is_list(model.model_fields[name].annotation):
            found[name] = given
        elif len(given) == 1:
            found[name] = given[0]
        else:
            raise problems.mistake(f"{where}.{name}", "repeated", "Must be given once.")
    return found


def _checked(model: type[Model], values: dict[str, Any], *, where: str) -> Model:
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise problems.invalid(error, where=where) from None


def _is_list(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return any(map(_is_list, get_args(annotation)))
    return get_origin(annotation) is list
