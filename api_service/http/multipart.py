"""Parses multipart requests: uploaded files and form fields."""

import base64
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import orjson
from flask import Request
from werkzeug.datastructures import FileStorage, Headers, MultiDict
from werkzeug.exceptions import UnsupportedMediaType
from werkzeug.formparser import FormDataParser, MultiPartParser
from werkzeug.sansio.multipart import File

from api_service.http import problems, requests
from shared.contracts.generation import RagGenerateRequest
from shared.contracts.images import UploadFields
from shared.contracts.search import SearchRequest
from shared.errors import MalformedBodyError

MULTIPART = "multipart/form-data"


class _StrictPartParser(MultiPartParser):
    """Refuses texts that are not in their encoding. Werkzeug replaces the wrong bytes by U+FFFD."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._charsets: list[str] = []
        self._files: list[IO[bytes]] = []
        self.cls = self._decoded  # type: ignore[assignment]  # it is called with all texts, and with all files

    def start_file_streaming(self, event: File, total_content_length: int | None) -> IO[bytes]:
        self._files.append(super().start_file_streaming(event, total_content_length))
        return self._files[-1]

    def close_files(self) -> None:
        for file in self._files:
            file.close()

    def get_part_charset(self, headers: Headers) -> str:
        self._charsets.append(super().get_part_charset(headers))
        return "iso-8859-1"  # one character for each byte

    def _decoded(self, parts: "list[tuple[str | None, Any]]") -> "MultiDict[str, Any]":
        values = MultiDict[str, Any]()
        charsets = iter(self._charsets)
        for name, value in parts:
            if name is None:
                raise MalformedBodyError("A part of the multipart body has no name.")
            if isinstance(value, str):
                charset = next(charsets)
                try:
                    value = value.encode("iso-8859-1").decode(charset)
                except UnicodeDecodeError:
                    raise MalformedBodyError(f"The text of the field `{name}` is not {charset.upper()}.") from None
            values.add(name, value)
        return values


class _StrictFormParser(FormDataParser):
    """Refuses a multipart body that cannot be read. Werkzeug takes it for an empty one."""

    def parse(
        self, stream: IO[bytes], mimetype: str, content_length: int | None, options: dict[str, str] | None = None
    ) -> "tuple[IO[bytes], MultiDict[str, str], MultiDict[str, FileStorage]]":
        if mimetype != MULTIPART:
            return super().parse(stream, mimetype, content_length, options)
        boundary = (options or {}).get("boundary", "")
        if not boundary or not boundary.isascii():
            raise MalformedBodyError("The Content-Type has no boundary, or one that is not ASCII.")
        parser = _StrictPartParser(
            stream_factory=self.stream_factory,
            max_form_memory_size=self.max_form_memory_size,
            max_form_parts=self.max_form_parts,
        )
        with ExitStack() as after_error:
            after_error.callback(parser.close_files)
            try:
                form, files = parser.parse(stream, boundary.encode("ascii"), content_length)
            except UnicodeDecodeError:
                raise MalformedBodyError("A header of a part of the multipart body is not UTF-8.") from None
            except ValueError as error:
                reason = f"cannot be read: {error}"
                if "cannot parse beyond" in reason:
                    reason = "does not end with the boundary that the Content-Type names"
                raise MalformedBodyError(f"The multipart body {reason}.") from None
            after_error.pop_all()
        return stream, form, files


class StrictRequest(Request):
    """A request whose `form` and `files` raise MalformedBodyError for a multipart body that cannot be read."""

    form_data_parser_class = _StrictFormParser


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
    _parse_one_array(values, "each")
    _parse_json_field(values, "attributes")
    return requests.parse_form(UploadFields, values)


def search_request(request: Request) -> SearchRequest:
    """Parse a multipart search: the image as a file, and the fields of the JSON body as form fields.

    `filter`, `mix` and `negative` are JSON.

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
    for name in ("mix", "negative"):
        _parse_one_array(values, name)
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


def _parse_one_array(values: dict[str, Any], name: str) -> None:
    """Replace the texts of a list field by the JSON array that is its only text."""
    if name in values:
        if len(values[name]) > 1:
            raise problems.field_error(f"form.{name}", "repeated", "Must be given once, as one JSON array.")
        values[name] = values[name][0]
        _parse_json_field(values, name)


def _parse_json_field(values: dict[str, Any], name: str) -> None:
    if name in values:
        try:
            values[name] = orjson.loads(values[name])
        except orjson.JSONDecodeError:
            raise problems.field_error(f"form.{name}", "json_invalid", "Must be JSON.") from None
