"""Multipart requests: files and the fields beside them."""

import base64
from collections.abc import Iterable
from typing import Any

import orjson
from flask import Request
from werkzeug.exceptions import UnsupportedMediaType

from api_service.http import problems, requests
from api_service.services.images import SentFile
from shared.contracts.images import UploadFields
from shared.contracts.search import SearchRequest

MULTIPART = "multipart/form-data"


def files(request: Request) -> list[SentFile]:
    """Every file sent under the name `file`.

    Raises:
        UnsupportedMediaType: the request is not multipart.
        ValidationError: a file came under another name, or `file` came as text.
    """
    _only_multipart(request)
    _only_files_named(request, "file")
    return [SentFile(name=sent.filename, data=sent.read()) for sent in request.files.getlist("file")]


def upload_fields(request: Request) -> UploadFields:
    """What the form says of its files: `tags` once, repeated or separated by commas; as JSON `attributes`, `each`."""
    values = requests.fields(UploadFields, request.form, where="form")
    if "tags" in values:
        values["tags"] = tags(values["tags"])
    if len(values.get("each", [])) > 1:
        raise problems.mistake("form.each", "repeated", "Must be given once, as one JSON array.")
    if "each" in values:
        values["each"] = values["each"][0]
    _read_json(values, "attributes")
    _read_json(values, "each")
    return requests.form(UploadFields, values)


def tags(given: Iterable[str]) -> list[str]:
    """Each of them may hold several, separated by commas."""
    each = (tag.strip() for text in given for tag in text.split(","))
    return list(dict.fromkeys(tag for tag in each if tag))


def search_request(request: Request) -> SearchRequest:
    """A search whose image comes as a file: the fields of the JSON body as form fields, `filter` as JSON."""
    _only_multipart(request)
    _only_files_named(request, "image")
    sent = request.files.getlist("image")
    if len(sent) > 1:
        raise problems.mistake("form.image", "repeated", "Must be given once.")
    values = requests.fields(SearchRequest, request.form, where="form")
    _read_json(values, "filter")
    if sent:
        values["image"] = base64.b64encode(sent[0].read()).decode()
    return requests.form(SearchRequest, values)


def is_multipart(request: Request) -> bool:
    return request.mimetype == MULTIPART


def _only_multipart(request: Request) -> None:
    if not is_multipart(request):
        raise UnsupportedMediaType(f"The body must be {MULTIPART}.")


def _only_files_named(request: Request, name: str) -> None:
    for other in request.files:
        if other != name:
            raise problems.mistake(f"form.{other}", "extra_forbidden", f"Files are sent under the name `{name}`.")
    if name in request.form:
        raise problems.mistake(f"form.{name}", "file_expected", "Must be a file, not text.")


def _read_json(values: dict[str, Any], name: str) -> None:
    if name in values:
        try:
            values[name] = orjson.loads(values[name])
        except orjson.JSONDecodeError:
            raise problems.mistake(f"form.{name}", "json_invalid", "Must be JSON.") from None
