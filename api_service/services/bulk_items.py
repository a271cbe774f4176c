"""Lines of a bulk made into its header, into items with nothing left open, or into the reasons why they are none."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
import pydantic
from sqlalchemy.orm import Session

from api_service.http import problems
from api_service.http.auth import Caller
from api_service.services import generation
from api_service.services.bulk_lines import Line
from shared.contracts.bulks import OF_THE_BULK, BulkGenerateItem, BulkHeader, BulkOptions, BulkRagGenerateItem
from shared.contracts.generation import GenerationParameters, Mode
from shared.contracts.jobs import JobKind
from shared.db import bulks, images, spaces, workers
from shared.db.tables import Bulk
from shared.errors import (
    BaseAppException,
    MalformedBodyError,
    ReferenceUnavailableError,
    ResourceNotFoundError,
    ValidationError,
)
from shared.settings import BulkSettings, Settings

CUSTOM_ID_LENGTH = 200

ItemRequest = BulkGenerateItem | BulkRagGenerateItem


def header(line: Line | None) -> BulkOptions | None:
    """What the stream's first line says of the whole bulk; None when it is no header.

    Raises:
        ValidationError: it is one, and wrong.
    """
    if line is None or line.text is None:
        return None
    try:
        fields = orjson.loads(line.text)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(fields, dict) or "bulk" not in fields:
        return None
    try:
        options = BulkHeader.model_validate_json(line.text, strict=True).bulk
    except pydantic.ValidationError as error:
        raise problems.invalid(error, where="header") from None
    if options.defaults:
        _check_defaults(options.defaults)
    return options


def _check_defaults(defaults: dict[str, Any]) -> None:
    """A mistake in the defaults is told once, instead of for every line."""
    where = "header.bulk.defaults"
    if "custom_id" in defaults:
        raise problems.mistake(f"{where}.custom_id", "extra_forbidden", "Every item has its own.")
    _item({"prompt": "any", **defaults}, where=where)


# --- items --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """What lines have come to, as columns of their tables."""

    items: list[dict[str, Any]]
    errors: list[dict[str, Any]]


@dataclass(frozen=True)
class _Parsed:
    line: Line
    request: ItemRequest
    parameters: GenerationParameters


def check(session: Session, bulk: Bulk, lines: Sequence[Line], *, caller: Caller, settings: Settings) -> Checked:
    """Each line as an item with nothing left open, or as the reason why it is none. Blank lines are neither."""
    errors: list[dict[str, Any]] = []
    capabilities = workers.capabilities(session)
    parsed: list[_Parsed] = []
    for line in lines:
        if line.text is not None and not line.text.strip():
            continue
        fields: object = None
        try:
            fields = _fields(line, settings.bulks)
            request = _item({**bulk.defaults, **fields}, where=f"line.{line.number}")
            retrieval = generation.retrieval_of(request)
            parameters = generation.resolved(request, retrieval, settings=settings, capabilities=capabilities)
        except BaseAppException as error:
            errors.append(_error(line, fields, error))
        else:
            parsed.append(_Parsed(line, request, parameters))

    present = _present(session, parsed, caller=caller)
    taken = _taken(session, bulk, parsed)
    items: list[dict[str, Any]] = []
    for each in parsed:
        try:
            _check_references(each, present)
            _check_custom_id(each, taken)
        except BaseAppException as error:
            errors.append(_error(each.line, {"custom_id": each.request.custom_id}, error))
        else:
            items.append(_columns(each, settings))
    return Checked(items, errors)


def _fields(line: Line, settings: BulkSettings) -> dict[str, Any]:
    if line.text is None:
        raise ValidationError(f"A line may have {settings.max_line_bytes} bytes.")
    try:
        fields = orjson.loads(line.text)
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(f"The line is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise MalformedBodyError("The line is not a JSON object.")
    return fields


def _item(fields: dict[str, Any], *, where: str) -> ItemRequest:
    """Read as strictly as a request's body.

    Raises:
        ValidationError
    """
    misplaced = [name for name in OF_THE_BULK if name in fields]
    if misplaced:
        raise ValidationError(
            errors=[
                {"field": f"{where}.{name}", "code": "extra_forbidden", "message": "This belongs to the bulk's header."}
                for name in misplaced
            ]
        )
    model = BulkGenerateItem if fields.get("kind") == JobKind.GENERATE else BulkRagGenerateItem
    try:
        return model.model_validate_json(orjson.dumps(fields), strict=True)
    except pydantic.ValidationError as error:
        raise problems.invalid(error, where=where) from None


def _error(line: Line, fields: object, error: BaseAppException) -> dict[str, Any]:
    custom_id = fields.get("custom_id") if isinstance(fields, dict) else None
    sane = isinstance(custom_id, str) and len(custom_id) <= CUSTOM_ID_LENGTH and custom_id.isprintable()
    return {
        "line": line.number,
        "custom_id": custom_id if sane else None,
        "code": error.code,
        "detail": "The line is not valid." if type(error) is ValidationError and error.errors else error.message,
        "errors": getattr(error, "errors", []),
    }


@dataclass(frozen=True)
class _Present:
    collections: frozenset[str]
    images: frozenset[UUID]


def _present(session: Session, parsed: Iterable[_Parsed], *, caller: Caller) -> _Present:
    """What there is of the collections and images that the items name."""
    names: set[str] = set()
    ids: set[UUID] = set()
    for each in parsed:
        if each.parameters.mode is not Mode.NONE:
            names.add(each.parameters.filter.collection)
            ids.update(reference.image_id for reference in each.parameters.references)
    there = set()
    for name in names:
        try:
            images.get_collection(session, name, owner_id=caller.owner_id)
        except ResourceNotFoundError:
            continue
        there.add(name)
    space = spaces.find_active(session) if ids else None
    found = set() if space is None else images.searchable(session, space, list(ids), owner_id=caller.owner_id)
    return _Present(frozenset(there), frozenset(found))


def _check_references(each: _Parsed, present: _Present) -> None:
    parameters = each.parameters
    if parameters.mode is Mode.NONE:
        return
    if parameters.filter.collection not in present.collections:
        field = f"line.{each.line.number}.filter.collection"
        raise problems.mistake(field, "unknown_collection", "There is no such collection.")
    missing = [str(each.image_id) for each in parameters.references if each.image_id not in present.images]
    if missing:
        raise ReferenceUnavailableError(f"A pinned reference is gone or not yet searchable: {', '.join(missing)}.")


def _taken(session: Session, bulk: Bulk, parsed: Iterable[_Parsed]) -> dict[str, int]:
    named = [each.request.custom_id for each in parsed if each.request.custom_id is not None]
    return bulks.lines_of(session, bulk.id, named) if named else {}


def _check_custom_id(each: _Parsed, taken: dict[str, int]) -> None:
    custom_id = each.request.custom_id
    if custom_id is None:
        return
    first = taken.setdefault(custom_id, each.line.number)
    if first != each.line.number:
        field = f"line.{each.line.number}.custom_id"
        raise problems.mistake(field, "repeated", f"Line {first} has the same custom_id.")


def _columns(each: _Parsed, settings: Settings) -> dict[str, Any]:
    longest_s = settings.jobs.timeout_s
    return {
        "line": each.line.number,
        "custom_id": each.request.custom_id,
        "kind": each.request.kind,
        "model": each.parameters.model,
        "images": len(each.parameters.seeds),
        "parameters": orjson.Fragment(each.parameters.model_dump_json()),
        "metadata": each.request.metadata,
        "timeout_s": min(each.request.timeout_s or longest_s, longest_s),
    }
