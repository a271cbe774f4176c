"""Turn rows, templates and grids into the items of a bulk, each with the names of its files."""

import itertools
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pydantic

from scripts.table_files import Row, Values, cell_text, describe_columns
from shared.contracts.bulks import BulkGenerateItem, BulkRagGenerateItem
from shared.contracts.generation import seeds_from
from shared.contracts.jobs import JobKind

DEFAULT_NAME_TEMPLATE = "{index:06d}-{slug}-{seed}.{ext}"
MAX_SLUG_CHARS, MAX_PART_BYTES = 48, 80
MAX_NAME_BYTES = 200
BULK_FIELDS = frozenset({"lane", "webhook", "dry_run"})
"""Fields of a request that a bulk sets once for all items."""
COMPUTED_FIELDS = frozenset({"prompt", "seed", "kind", "custom_id"})


class PlanError(Exception):
    """The options or the rows do not give a valid plan."""


@dataclass(frozen=True)
class PlanOptions:
    """How rows become items.

    Attributes:
        first_seed: seed of the first item of a row without a seed; in [0, 2**32).
        template: the prompt, with `{names}` of columns and grid variables; None: the prompt of the row.
        grid: values of each variable; every combination gives a prompt.
        columns: column by field of the request, for columns with another name than their field.
        fields: request fields for rows that do not have them.
        metadata: columns that become metadata of the items.
        seeds: items per prompt, with different seeds.
        name: template of the file names.
    """

    first_seed: int
    template: str | None = None
    grid: Mapping[str, Sequence[str]] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    metadata: Sequence[str] = ()
    seeds: int = 1
    kind: JobKind = JobKind.RAG_GENERATE
    name: str = DEFAULT_NAME_TEMPLATE


@dataclass(frozen=True)
class PlannedItem:
    """One item. `files[i]` is the path of its image `i`, relative to the folder of images."""

    row: int
    request: Values
    files: list[str]

    @property
    def line(self) -> bytes:
        """The item's line in the bulk's stream."""
        return json.dumps(self.request, ensure_ascii=False).encode()


@dataclass(frozen=True)
class RejectedRow:
    """A row of which some or all grid combinations are not valid requests, for this reason."""

    row: int
    reason: str


def plan_items(rows: Iterable[Row], options: PlanOptions) -> Iterator[PlannedItem | RejectedRow]:
    """Yield the items of all rows in order; an item with the `custom_id` or file name of an earlier one is rejected."""
    taken: dict[tuple[str, str], int] = {}
    index = 0
    for row in rows:
        if row.problem is not None:
            yield RejectedRow(row.number, row.problem)
            continue
        reasons = set[str]()  # combinations of a grid often have the same one
        for expanded, values in enumerate(_combinations(row, options), 1):
            try:
                planned = list(_items(row, values, options, index=index, expanded=expanded))
                _reserve_names(taken, planned)
            except (_InvalidRowError, ValueError) as error:
                if str(error) not in reasons:
                    reasons.add(str(error))
                    yield RejectedRow(row.number, str(error))
                continue
            index += len(planned)
            yield from planned


def _combinations(row: Row, options: PlanOptions) -> Iterator[Values]:
    for chosen in itertools.product(*options.grid.values()):
        yield row.values | dict(zip(options.grid, chosen, strict=True))


def _items(row: Row, values: Values, options: PlanOptions, *, index: int, expanded: int) -> Iterator[PlannedItem]:
    model = BulkGenerateItem if options.kind is JobKind.GENERATE else BulkRagGenerateItem
    request = dict(options.fields)
    for name in model.model_fields.keys() - COMPUTED_FIELDS:
        column = options.columns.get(name, name)
        if column in values:
            if name in BULK_FIELDS:
                raise _InvalidRowError(f"`{name}` is the same for all items: give it as an option")
            request[name] = _parse_cell(values[column])
    request["kind"] = options.kind
    request["prompt"] = _prompt(values, options)
    if options.metadata:
        metadata = {column: cell_text(values, column) for column in options.metadata if column in values}
        request["metadata"] = {**request.get("metadata", {}), **metadata}
    id_column = options.columns.get("custom_id", "custom_id")
    given_id = cell_text(values, id_column) if id_column in values else None
    first_seed = values.get(options.columns.get("seed", "seed"), options.first_seed)
    for number in range(options.seeds):
        # Validate with the first seed, because the other seeds are computed from validated fields.
        request["seed"] = first_seed
        request["custom_id"] = _custom_id(given_id, index + number + 1, options, expanded=expanded, number=number)
        item = _validate(model, request)
        assert item.seed is not None
        (seed,) = seeds_from(item.seed + number * item.num_images, 1)
        item = item.model_copy(update={"seed": seed})
        sent = item.model_dump(mode="json", exclude_unset=True)
        yield PlannedItem(row.number, sent, _file_names(item, values, options, index=index + number + 1))


def _prompt(values: Values, options: PlanOptions) -> str:
    if options.template is not None:
        return fill_template(options.template, values)
    column = options.columns.get("prompt", "prompt")
    if column not in values:
        found = f"; it has: {describe_columns(values)}" if values else ""
        raise _InvalidRowError(f"the row has no `{column}`{found}")
    # Without a grid, braces in a prompt are plain text.
    prompt = cell_text(values, column)
    return fill_template(prompt, values) if options.grid else prompt


def _custom_id(given: str | None, index: int, options: PlanOptions, *, expanded: int, number: int) -> str:
    if given is None:
        return f"{index:06d}"
    parts = [given]
    if options.grid:
        parts.append(str(expanded))
    if options.seeds > 1:
        parts.append(f"s{number + 1}")
    return "-".join(parts)


def _validate(
    model: type[BulkGenerateItem] | type[BulkRagGenerateItem], request: Values
) -> BulkGenerateItem | BulkRagGenerateItem:
    try:
        return model.model_validate(request)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise _InvalidRowError(
            "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems)
        ) from None


def _parse_cell(value: Any) -> Any:
    """Parse a list or an object, which tables hold as JSON."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


# --- templates ----------------------------------------------------------------------------------------------------


class _InvalidRowError(Exception):
    pass


class _NamesOnlyFormatter(string.Formatter):
    """`str.format` with plain names only: no attributes, no indices, no positions."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        if field_name not in kwargs:
            raise _InvalidRowError(f"the template names {{{field_name}}}, which does not exist")
        value = kwargs[field_name]
        # Other types keep their format specifications, such as `{number:03d}`.
        return cell_text(kwargs, field_name) if isinstance(value, bool | list | dict | bytes) else value, field_name


def fill_template(template: str, values: Mapping[str, Any]) -> str:
    """Return the template with every `{name}` replaced; `{{` is a literal brace."""
    try:
        return _NamesOnlyFormatter().vformat(template, (), values)
    except ValueError as error:
        raise _InvalidRowError(f"the template {template!r}: {error}") from None


def _file_names(
    item: BulkGenerateItem | BulkRagGenerateItem, values: Values, options: PlanOptions, *, index: int
) -> list[str]:
    assert item.seed is not None
    known: dict[str, Any] = {
        name: value if isinstance(value, bytes) else _path_part(cell_text(values, name))
        for name, value in values.items()
    }
    known |= {
        "index": index,
        "custom_id": _path_part(str(item.custom_id)),
        "prompt": _path_part(item.prompt),
        "slug": slug(item.prompt),
        "ext": "jpg" if item.format == "jpeg" else item.format.value,
    }
    names = []
    for n, seed in enumerate(seeds_from(item.seed, item.num_images)):
        name = PurePosixPath(fill_template(options.name, known | {"seed": seed, "n": n}))
        if name.is_absolute() or not name.parts or any(part.startswith(".") for part in name.parts):
            raise _InvalidRowError(f"{name} is not a valid file name below the output folder")
        if any(len(part.encode()) > MAX_NAME_BYTES for part in name.parts):
            raise _InvalidRowError(f"the file name {name} is too long")
        names.append(str(name))
    return names


def slug(text: str) -> str:
    """Return the first words of a text in a form for file names."""
    words = re.findall(r"\w+", text.lower())
    short = "-".join(words)[:MAX_SLUG_CHARS].encode()[:MAX_PART_BYTES].decode(errors="ignore")
    return short.strip("-_") or "image"


def _path_part(text: str) -> str:
    """Replace the characters of a value that would make another folder or a hidden file."""
    clean = re.sub(r"[^\w.+@ -]+", "-", text)[:MAX_PART_BYTES].encode()[:MAX_PART_BYTES].decode(errors="ignore")
    return clean.strip(" .-") or "-"


def _reserve_names(taken: dict[tuple[str, str], int], planned: Sequence[PlannedItem]) -> None:
    """Reserve the names of these items of one row; if one is taken, reserve none of them.

    Raises:
        _InvalidRowError: another item has one of these names.
    """
    wanted: dict[tuple[str, str], int] = {}
    for item in planned:
        # Some file systems treat `A` and `a` as the same name.
        names = [("custom_id", item.request["custom_id"]), *(("file name", name.casefold()) for name in item.files)]
        for key in names:
            if (other := taken.get(key, wanted.get(key))) is not None:
                raise _InvalidRowError(f"row {other} already uses the {key[0]} {key[1]!r}")
            wanted[key] = item.row
    taken |= wanted
