"""From rows, templates and grids to the items of a bulk, each with the names of the files it will become."""

import itertools
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pydantic

from scripts.table_files import Row, Values
from shared.contracts.bulks import BulkGenerateItem, BulkRagGenerateItem
from shared.contracts.generation import seeds_from
from shared.contracts.jobs import JobKind

DEFAULT_NAME = "{index:06d}-{slug}-{seed}.{ext}"
SLUG_LENGTH, PART_LENGTH = 48, 80
LONGEST_NAME_BYTES = 200
OF_THE_BULK = frozenset({"lane", "webhook", "dry_run"})
MADE_HERE = frozenset({"prompt", "seed", "kind", "custom_id"})


class PlanError(Exception):
    """The options cannot make a plan."""


@dataclass(frozen=True)
class Recipe:
    """What is made of each row.

    Attributes:
        template: the prompt, with `{names}` of columns and grid variables; none: the row's own prompt.
        grid: values of each variable; every combination becomes a prompt of its own.
        columns: column of a request's field, where it has another name.
        fields: the request's fields for rows that do not say them.
        metadata: columns that are echoed as metadata.
        seeds: items per prompt, with different seeds.
        first_seed: seed of the first of them, where the row names none; in [0, 2**32).
        name: template of file names.
    """

    first_seed: int
    template: str | None = None
    grid: Mapping[str, Sequence[str]] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    metadata: Sequence[str] = ()
    seeds: int = 1
    kind: JobKind = JobKind.RAG_GENERATE
    name: str = DEFAULT_NAME


@dataclass(frozen=True)
class PlannedItem:
    """One item. `files[i]` is where its image `i` goes, below the folder of images."""

    row: int
    request: Values
    files: list[str]

    @property
    def line(self) -> bytes:
        """As the bulk gets it."""
        return json.dumps(self.request, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Rejected:
    """A row, or what one combination of the grid makes of it, that is no valid request."""

    row: int
    reason: str


def plan(rows: Iterable[Row], recipe: Recipe) -> Iterator[PlannedItem | Rejected]:
    """The items of all rows, in order; of two that would have the same `custom_id` or the same file, the first."""
    taken: dict[tuple[str, str], int] = {}
    index = 0
    for row in rows:
        if row.problem is not None:
            yield Rejected(row.number, row.problem)
            continue
        for expanded, values in enumerate(_combinations(row, recipe), 1):
            try:
                made = list(_items(row, values, recipe, index=index, expanded=expanded))
                _claim(taken, made)
            except _NotARequestError as error:
                yield Rejected(row.number, str(error))
                continue
            index += len(made)
            yield from made


def _combinations(row: Row, recipe: Recipe) -> Iterator[Values]:
    for chosen in itertools.product(*recipe.grid.values()):
        yield row.values | dict(zip(recipe.grid, chosen, strict=True))


def _items(row: Row, values: Values, recipe: Recipe, *, index: int, expanded: int) -> Iterator[PlannedItem]:
    model = BulkGenerateItem if recipe.kind is JobKind.GENERATE else BulkRagGenerateItem
    request = dict(recipe.fields)
    for name in model.model_fields.keys() - MADE_HERE:
        column = recipe.columns.get(name, name)
        if column in values:
            if name in OF_THE_BULK:
                raise _NotARequestError(f"`{name}` holds for all items: give it as an option")
            request[name] = _from_cell(values[column])
    request["kind"] = recipe.kind
    request["prompt"] = _prompt(values, recipe)
    if recipe.metadata:
        said = {column: str(values[column]) for column in recipe.metadata if column in values}
        request["metadata"] = {**request.get("metadata", {}), **said}
    given_id = values.get(recipe.columns.get("custom_id", "custom_id"))
    first_seed = values.get(recipe.columns.get("seed", "seed"), recipe.first_seed)
    for number in range(recipe.seeds):
        # Known only when it is valid, so the first try is with the first seed.
        request["seed"] = first_seed
        request["custom_id"] = _custom_id(given_id, index + number + 1, recipe, expanded=expanded, number=number)
        item = _valid(model, request)
        assert item.seed is not None
        (seed,) = seeds_from(item.seed + number * item.num_images, 1)
        item = item.model_copy(update={"seed": seed})
        sent = item.model_dump(mode="json", exclude_unset=True)
        yield PlannedItem(row.number, sent, _files(item, values, recipe, index=index + number + 1))


def _prompt(values: Values, recipe: Recipe) -> str:
    if recipe.template is not None:
        return fill(recipe.template, values)
    column = recipe.columns.get("prompt", "prompt")
    if column not in values:
        raise _NotARequestError(f"there is no `{column}`")
    # Braces in a prompt mean something only where there is something to fill in.
    return fill(str(values[column]), values) if recipe.grid else str(values[column])


def _custom_id(given: Any, index: int, recipe: Recipe, *, expanded: int, number: int) -> str:
    if given is None:
        return f"{index:06d}"
    parts = [str(given)]
    if recipe.grid:
        parts.append(str(expanded))
    if recipe.seeds > 1:
        parts.append(f"s{number + 1}")
    return "-".join(parts)


def _valid(
    model: type[BulkGenerateItem] | type[BulkRagGenerateItem], request: Values
) -> BulkGenerateItem | BulkRagGenerateItem:
    try:
        return model.model_validate(request)
    except pydantic.ValidationError as error:
        mistakes = error.errors(include_url=False, include_input=False, include_context=False)
        raise _NotARequestError(
            "; ".join(f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg']}" for mistake in mistakes)
        ) from None


def _from_cell(value: Any) -> Any:
    """Lists and objects stand in tables as JSON."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


# --- templates ----------------------------------------------------------------------------------------------------


class _NotARequestError(Exception):
    pass


class _Names(string.Formatter):
    """`str.format` that knows names and nothing else: no attributes, no items, no positions."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        if field_name not in kwargs:
            raise _NotARequestError(f"the template names {{{field_name}}}, which is not there")
        return kwargs[field_name], field_name


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with every `{name}` replaced; `{{` is a brace."""
    try:
        return _Names().vformat(template, (), values)
    except ValueError as error:
        raise _NotARequestError(f"the template {template!r}: {error}") from None


def _files(item: BulkGenerateItem | BulkRagGenerateItem, values: Values, recipe: Recipe, *, index: int) -> list[str]:
    assert item.seed is not None
    known: dict[str, Any] = {name: _path_part(str(value)) for name, value in values.items()}
    known |= {
        "index": index,
        "custom_id": _path_part(str(item.custom_id)),
        "prompt": _path_part(item.prompt),
        "slug": slug(item.prompt),
        "ext": "jpg" if item.format == "jpeg" else item.format.value,
    }
    names = []
    for n, seed in enumerate(seeds_from(item.seed, item.num_images)):
        name = PurePosixPath(fill(recipe.name, known | {"seed": seed, "n": n}))
        if name.is_absolute() or not name.parts or any(part.startswith(".") for part in name.parts):
            raise _NotARequestError(f"{name} is no name of a file below the output folder")
        if any(len(part.encode()) > LONGEST_NAME_BYTES for part in name.parts):
            raise _NotARequestError(f"the file name {name} is too long")
        names.append(str(name))
    return names


def slug(text: str) -> str:
    """A few words of a text, fit for a file name."""
    words = re.findall(r"\w+", text.lower())
    short = "-".join(words)[:SLUG_LENGTH].encode()[:PART_LENGTH].decode(errors="ignore")
    return short.strip("-_") or "image"


def _path_part(text: str) -> str:
    """A value without what would make another folder or a hidden file of it."""
    clean = re.sub(r"[^\w.+@ -]+", "-", text)[:PART_LENGTH].encode()[:PART_LENGTH].decode(errors="ignore")
    return clean.strip(" .-") or "-"


def _claim(taken: dict[tuple[str, str], int], made: Sequence[PlannedItem]) -> None:
    """All names of these items, or none: they come from one row."""
    wanted: dict[tuple[str, str], int] = {}
    for item in made:
        # Some file systems do not tell `A` from `a`.
        names = [("custom_id", item.request["custom_id"]), *(("file name", name.casefold()) for name in item.files)]
        for key in names:
            if (other := taken.get(key, wanted.get(key))) is not None:
                raise _NotARequestError(f"it would have the same {key[0]} {key[1]!r} as row {other}")
            wanted[key] = item.row
    taken |= wanted
