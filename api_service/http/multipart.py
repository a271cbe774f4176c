"""Parses multipart requests: uploaded files and form fields."""

import base64
from dataclasses import dataclass
from typing import Any

import orjson
from flask import Request
from werkzeug.exceptions import UnsupportedMediaType

from api_service.http import problems, requests
from shared.contracts.generation import RagGenerateRequest
from shared.contracts.images import UploadFields
from shared.contracts.search import SearchRequest
from shared.errors import MalformedBodyError

MULTIPART = "multipart/form-data"


@dataclass(frozen=True)
class SentFile:
    """A file of a request, with the name that the client gives it."""

    name: str | None
    data: bytes


def uploaded_files(request: Request) -> list[SentFile]:
    """Return all files sent under the name `file`.

    Raises:
        UnsupportedMediaType: the request is not multipart.
        ValidationError: a file was sent under another name, or `file` was sent as text.
    """
    _require_multipart(request)
    _require_files_named(request, "file")
    return [SentFile(name=sent.filename, data=sent.read()) for sent in request.files.getlist("file")]


def upload_fields(request: Request) -> UploadFields:
    """Parse the description of an upload: `tags` as in `requests.split_tags`, `attributes` and `each` as JSON.

    Raises:
        ValidationError: a field is invalid, or was sent more than once.
    """
    values = requests.field_values(UploadFields, request.form, where="form")
    if "tags" in values:
        values["tags"] = requests.split_tags(values["tags"])
    if len(values.get("each", [])) > 1:
        raise problems.field_error("form.each", "repeated", "Must be given once, as one JSON array.")
    if "each" in values:
        values["each"] = values["each"][0]
    _parse_json_field(values, "attributes")
    _parse_json_field(values, "each")
    return requests.parse_form(UploadFields, values)


def search_request(request: Request) -> SearchRequest:
    """Parse a multipart search: the image as a file, the fields of the JSON body as form fields, `filter` as JSON.

    Raises:
        UnsupportedMediaType: the request is not multipart.
        ValidationError: a field is invalid or was sent more than once, or a file has another name than `image`.
    """
    _require_multipart(request)
    _require_files_named(request, "image")
    sent = request.files.getlist("image")
    if len(sent) > 1:
        raise problems.field_error("form.image", "repeated", "Must be given once.")
    values = requests.field_values(SearchRequest, request.form, where="form")
    _parse_json_field(values, "filter")
    if sent:
        values["image"] = base64.b64encode(sent[0].read()).decode()
    return requests.parse_form(SearchRequest, values)


def rag_generate_request(request: Request) -> RagGenerateRequest:
    """Parse a multipart generation: the JSON body in the field `request`, and pictures under `reference_image`.

    The entries of `reference_images` describe the files, in order. They may be left out.

    Raises:
        MalformedBodyError: the field `request` is not valid JSON.
        ValidationError: a field is missing or wrong, or the numbers of files and descriptions differ.
    """
    _require_files_named(request, "reference_image")
    for other in request.form:
        if other != "request":
            raise problems.field_error(f"form.{other}", "extra_forbidden", "Put it into the JSON of `request`.")
    texts = request.form.getlist("request")
    if len(texts) != 1:
        raise problems.field_error("form.request", "missing" if not texts else "repeated", "Must be given once.")
    try:
        body = orjson.loads(texts[0])
    except orjson.JSONDecodeError:
        raise MalformedBodyError("The field `request` is not valid JSON.") from None
    if not isinstance(body, dict):
        raise problems.field_error("form.request", "dict_type", "Must be a JSON object.")
    files = request.files.getlist("reference_image")
    descriptions = body.get("reference_images", [{} for _ in files])
    if isinstance(descriptions, list):
        if len(descriptions) != len(files):
            message = f"There are {len(files)} files for {len(descriptions)} entries of `reference_images`."
            raise problems.field_error("form.reference_image", "length", message)
        for index, (each, file) in enumerate(zip(descriptions, files, strict=True)):
            if isinstance(each, dict):
                if "data" in each:
                    field = f"body.reference_images.{index}.data"
                    raise problems.field_error(field, "extra_forbidden", "The picture is the file.")
                each["data"] = base64.b64encode(file.read()).decode()
        body["reference_images"] = descriptions
    try:
        text = orjson.dumps(body)
    except orjson.JSONEncodeError as error:  # it takes fewer levels than `orjson.loads`
        raise MalformedBodyError(f"The field `request` is not valid JSON: {error}.") from None
    return requests.parse_json(RagGenerateRequest, text)


def is_multipart(request: Request) -> bool:
    return request.mimetype == MULTIPART


def _require_multipart(request: Request) -> None:
    if not is_multipart(request):
        raise UnsupportedMediaType(f"The body must be {MULTIPART}.")


def _require_files_named(request: Request, name: str) -> None:
    for other in request.files:
        if other != name:
            raise problems.field_error(f"form.{other}", "extra_forbidden", f"Send files under the name `{name}`.")
    if name in request.form:
        raise problems.field_error(f"form.{name}", "file_expected", "Must be a file, not text.")


def _parse_json_field(values: dict[str, Any], name: str) -> None:
    if name in values:
        try:
            values[name] = orjson.loads(values[name])
        except orjson.JSONDecodeError:
            raise problems.field_error(f"form.{name}", "json_invalid", "Must be JSON.") from None
