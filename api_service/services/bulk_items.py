"""Parses and checks the lines of a bulk: the header, and items with every value resolved. Wrong lines become errors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from uuid import UUID

import orjson
import pydantic
from sqlalchemy.orm import Session

from api_service.http import problems
from api_service.http.auth import Caller
from api_service.services import generation
from api_service.services.bulk_lines import Line
from shared.concepts import split_prompt
from shared.contracts.bulks import BULK_LEVEL_FIELDS, BulkGenerateItem, BulkHeader, BulkOptions, BulkRagGenerateItem
from shared.contracts.collections import CollectionDefaults
from shared.contracts.generation import GenerationParameters, Mode
from shared.contracts.jobs import JobKind
from shared.contracts.search import ImageFilter
from shared.db import bulks, calibrations, collections, images, spaces, workers
from shared.db.collections import defaults_of
from shared.db.tables import Bulk, split_parameters
from shared.errors import (
    BaseAppException,
    MalformedBodyError,
    ReferenceUnavailableError,
    ValidationError,
)
from shared.settings import BulkSettings, Settings

MAX_CUSTOM_ID_LENGTH = 200

ItemRequest = BulkGenerateItem | BulkRagGenerateItem


def parse_header(line: Line | None) -> BulkOptions | None:
    """Return the options of the bulk from the first line of its stream; `None`: the line is not a header.

    Raises:
        ValidationError: the line is a header, and not valid.
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
        raise problems.validation_error(error, where="header") from None
    if options.defaults:
        _check_defaults(options.defaults)
    return options


def _check_defaults(defaults: dict[str, Any]) -> None:
    """Check the defaults on their own, so that a mistake in them is reported once and not for every line."""
    where = "header.bulk.defaults"
    if "custom_id" in defaults:
        raise problems.field_error(
            f"{where}.custom_id", "extra_forbidden", "A custom_id is unique in the bulk, so it has no default."
        )
    _parse_item({"prompt": "any", **defaults}, where=where)


# --- items --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParsedLines:
    """The requests of a chunk of lines, with split prompts, and the errors of the other lines."""

    requests: list[tuple[Line, ItemRequest, generation.Retrieval]]
    errors: list[dict[str, Any]]


@dataclass(frozen=True)
class CheckedLines:
    """The items and errors of a chunk of lines, as columns of their tables."""

    items: list[dict[str, Any]]
    errors: list[dict[str, Any]]


@dataclass(frozen=True)
class _ResolvedLine:
    line: Line
    request: ItemRequest
    parameters: GenerationParameters

    @property
    def filters(self) -> dict[str, ImageFilter]:
        """The filters by which the item searches, by their paths."""
        if not self.parameters.k:
            return {}
        where = f"line.{self.line.number}"
        of_concepts = {
            f"{where}.concepts.{number}.filter": concept.filter
            for number, concept in enumerate(self.parameters.concepts)
            if concept.filter is not None
        }
        return {f"{where}.filter": self.parameters.filter, **of_concepts}


def parse_lines(lines: Sequence[Line], *, defaults: dict[str, Any], settings: BulkSettings) -> ParsedLines:
    """Turn each line into a request, or into an error. Blank lines are skipped.

    Splitting the prompts of a chunk takes up to a second. Call it outside of the transaction that locks the bulk.
    """
    parsed = ParsedLines([], [])
    for line in lines:
        if line.text is not None and not line.text.strip():
            continue
        fields: object = None
        try:
            fields = _parse_json(line, settings)
            request = _parse_item({**defaults, **fields}, where=f"line.{line.number}")
            # The rules: a planner would take its time for each line.
            parsed.requests.append((line, request, generation.retrieval_of(request, split=split_prompt)))
        except BaseAppException as error:
            parsed.errors.append(_error_columns(line, fields, error))
    return parsed


def check_lines(
    session: Session, bulk: Bulk, lines: ParsedLines, *, caller: Caller, settings: Settings
) -> CheckedLines:
    """Turn each request into an item with every value resolved, or into an error."""
    errors = list(lines.errors)
    capabilities = {name: known for name, (known, _) in workers.list_capabilities(session).items()}
    calibration = calibrations.find_active(session)
    resolved: list[_ResolvedLine] = []

    @cache
    def find_defaults(name: str) -> CollectionDefaults:
        collection = collections.find_by_name(session, name, principal=caller.principal)
        return CollectionDefaults() if collection is None else defaults_of(collection)

    for line, request, retrieval in lines.requests:
        try:
            parameters = generation.resolve(
                request,
                retrieval,
                settings=settings,
                capabilities=capabilities,
                defaults=find_defaults(retrieval.where.collection),
                calibration=calibration,
            )
        except BaseAppException as error:
            errors.append(_error_columns(line, {"custom_id": request.custom_id}, error))
        else:
            resolved.append(_ResolvedLine(line, request, parameters))

    existing = _find_existing(session, resolved, caller=caller)
    lines_by_custom_id = _find_custom_ids(session, bulk, resolved)
    items: list[dict[str, Any]] = []
    for each in resolved:
        try:
            _check_references(each, existing)
            _check_custom_id(each, lines_by_custom_id)
        except BaseAppException as error:
            errors.append(_error_columns(each.line, {"custom_id": each.request.custom_id}, error))
        else:
            items.append(_item_columns(each, settings))
    return CheckedLines(items, errors)


def _parse_json(line: Line, settings: BulkSettings) -> dict[str, Any]:
    if line.text is None:
        raise ValidationError(f"The line is longer than {settings.max_line_bytes} bytes.")
    try:
        fields = orjson.loads(line.text)
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(f"The line is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise MalformedBodyError("The line is not a JSON object.")
    return fields


def _parse_item(fields: dict[str, Any], *, where: str) -> ItemRequest:
    """Parse an item as strictly as a request's body.

    where: name of the line, for the field paths of errors.

    Raises:
        ValidationError: a field is invalid or unknown, or belongs to the header.
        MalformedBodyError: the fields are nested too deeply.
    """
    misplaced = [name for name in BULK_LEVEL_FIELDS if name in fields]
    if misplaced:
        raise ValidationError(
            errors=[
                {
                    "field": f"{where}.{name}",
                    "code": "extra_forbidden",
                    "message": "This field belongs to the bulk's header.",
                }
                for name in misplaced
            ]
        )
    try:
        text = orjson.dumps(fields)
    except orjson.JSONEncodeError as error:  # it takes fewer levels than `orjson.loads`
        raise MalformedBodyError(f"The line is not valid JSON: {error}.") from None
    model = BulkGenerateItem if fields.get("kind") == JobKind.GENERATE else BulkRagGenerateItem
    try:
        return model.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise problems.validation_error(error, where=where) from None


def _error_columns(line: Line, fields: object, error: BaseAppException) -> dict[str, Any]:
    custom_id = fields.get("custom_id") if isinstance(fields, dict) else None
    is_valid = isinstance(custom_id, str) and len(custom_id) <= MAX_CUSTOM_ID_LENGTH and custom_id.isprintable()
    return {
        "line": line.number,
        "custom_id": custom_id if is_valid else None,
        "code": error.code,
        "detail": "The line is not valid." if type(error) is ValidationError and error.errors else error.message,
        "errors": getattr(error, "errors", []),
    }


@dataclass(frozen=True)
class _Existing:
    """The collections and searchable images, of those that the items name, that the caller can use."""

    collections: frozenset[str]
    images: frozenset[UUID]


def _find_existing(session: Session, parsed: Iterable[_ResolvedLine], *, caller: Caller) -> _Existing:
    """Find the collections and images that the items name, with few queries for all items."""
    names: set[str] = set()
    ids: set[UUID] = set()
    for each in parsed:
        if each.parameters.mode is not Mode.NONE:
            names.update(where.collection for where in each.filters.values())
            ids.update(reference.image_id for reference in each.parameters.references)
    known = {name for name in names if collections.find_by_name(session, name, principal=caller.principal) is not None}
    space = spaces.find_active(session) if ids else None
    found = set() if space is None else images.filter_searchable(session, space, list(ids), principal=caller.principal)
    return _Existing(frozenset(known), frozenset(found))


def _check_references(parsed: _ResolvedLine, existing: _Existing) -> None:
    parameters = parsed.parameters
    if parameters.mode is Mode.NONE:
        return
    for field, where in parsed.filters.items():
        if where.collection not in existing.collections:
            raise problems.field_error(f"{field}.collection", "unknown_collection", "No collection has this name.")
    missing = [str(each.image_id) for each in parameters.references if each.image_id not in existing.images]
    if missing:
        raise ReferenceUnavailableError(
            f"A pinned reference does not exist or is not searchable yet: {', '.join(missing)}."
        )


def _find_custom_ids(session: Session, bulk: Bulk, parsed: Iterable[_ResolvedLine]) -> dict[str, int]:
    """Return the line numbers, by custom_id, of stored items that have a custom_id of these lines."""
    custom_ids = [each.request.custom_id for each in parsed if each.request.custom_id is not None]
    return bulks.find_lines(session, bulk.id, custom_ids) if custom_ids else {}


def _check_custom_id(parsed: _ResolvedLine, lines_by_custom_id: dict[str, int]) -> None:
    """Add the custom_id to `lines_by_custom_id`.

    Raises:
        ValidationError: another line has the same custom_id.
    """
    custom_id = parsed.request.custom_id
    if custom_id is None:
        return
    first = lines_by_custom_id.setdefault(custom_id, parsed.line.number)
    if first != parsed.line.number:
        field = f"line.{parsed.line.number}.custom_id"
        raise problems.field_error(field, "repeated", f"Line {first} has the same custom_id.")


def _item_columns(parsed: _ResolvedLine, settings: Settings) -> dict[str, Any]:
    max_timeout_s = settings.jobs.timeout_s
    stored, new = split_parameters(parsed.parameters.model_dump(mode="json"))
    return {
        "line": parsed.line.number,
        "custom_id": parsed.request.custom_id,
        "kind": parsed.request.kind,
        "model": parsed.parameters.model,
        "images": len(parsed.parameters.seeds),
        "parameters": stored,
        "new_parameters": new,
        "metadata": parsed.request.metadata,
        "timeout_s": min(parsed.request.timeout_s or max_timeout_s, max_timeout_s),
    }
