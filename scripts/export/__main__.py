"""A corpus, or what was generated, into a Parquet file and back; `--help` teaches it by examples.

It speaks to the database and the blob store that the settings name, not to the API.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pydantic
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import select
from sqlalchemy.orm import Session

from scripts.console import EXIT_CODES, Exit, Output, add_output_options, collection_name, finish
from scripts.export import outgoing
from scripts.export.image_file import Header, ImageFileError, Kind, Row, Writer, opened, written
from scripts.export.incoming import bring, space_for
from shared.contracts.common import QueryMoment
from shared.db import owners, spaces
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import Collection, Owner
from shared.errors import BaseAppException, InvalidImageError, ResourceNotFoundError
from shared.storage import get_blobs

DESCRIPTION = """\
Images into a Parquet file and back, with what is said of them, their bytes and their vectors.

  corpus   a collection, so that it moves between installations without being embedded again: searches give the same
           answers with the same scores
  outputs  what was generated, each image with its whole record (prompt, parameters, seed, model and digest, references,
           versions), to keep, to audit, or to draw from elsewhere
  import   either of them into a collection; of outputs the images, under their own ids. Jobs are never made of a file

It speaks to the database and the blob store that the settings name, as the services do; run it where they run."""

EXAMPLES = f"""\
examples:
  the shared corpus into a file
    python -m scripts.export corpus corpus.parquet

  a collection of an owner
    python -m scripts.export corpus products.parquet --owner team-a --collection products

  into another installation; images that are there already stay as they are, so it may be repeated
    python -m scripts.export import corpus.parquet
    python -m scripts.export import products.parquet --owner team-b --collection products

  what was generated in January, of all owners, to keep
    python -m scripts.export outputs 2026-01.parquet --after 2026-01-01T00:00:00Z --before 2026-02-01T00:00:00Z

  the outputs of an owner with their CLIP vectors, then into another installation, to be drawn from there
    python -m scripts.export outputs best.parquet --owner team-a --vectors
    python -m scripts.export import best.parquet --owner team-b --collection best

  look at it with anything that reads Parquet
    python -c "import pyarrow.parquet as p; print(p.read_table('2026-01.parquet', columns=['prompt', 'model_digest']))"

Vectors are taken over when the file's embedding space is the active one there (or the first); otherwise the images are
embedded again by the workers.

{EXIT_CODES}"""


class UsageError(Exception):
    """The options make no sense together."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="write a collection to a file")
    outputs = commands.add_parser("outputs", help="write what was generated to a file")
    into = commands.add_parser("import", help="read a file into a collection")
    for command in (corpus, outputs, into):
        command.add_argument("file", type=Path)
    corpus.add_argument("--owner", help="whose collection (default: the shared one's)")
    corpus.add_argument("--collection", type=collection_name, default="shared", help="default: %(default)s")
    outputs.add_argument("--owner", help="whose (default: everybody's)")
    outputs.add_argument("--after", type=_moment, metavar="TIME", help="made at or after this time")
    outputs.add_argument("--before", type=_moment, metavar="TIME", help="made before this time")
    outputs.add_argument("--vectors", action="store_true", help="ask the embed workers for the vector of each")
    into.add_argument("--owner", help="whose collection (default: the shared one's)")
    into.add_argument("--collection", type=collection_name, help="default: the one it was; outputs need to be told")
    for command in (corpus, outputs, into):
        add_output_options(command)
    arguments = parser.parse_args()
    output = Output(quiet=arguments.quiet, as_json=arguments.as_json)
    act = {"corpus": _export_corpus, "outputs": _export_outputs, "import": _import}[arguments.command]
    finish(
        lambda: act(arguments, output),
        output,
        wrong=(ImageFileError, ResourceNotFoundError, UsageError, ValueError, OSError),
        stopped=BaseAppException,
        interrupted="Interrupted. An import goes on from here with the same command; an export begins again.",
    )


def _moment(text: str) -> object:
    return pydantic.TypeAdapter(QueryMoment).validate_python(text)


# --- out ----------------------------------------------------------------------------------------------------------


def _export_corpus(arguments: argparse.Namespace, output: Output) -> Exit:
    with session_scope() as session:
        collection = _collection(session, arguments.collection, owner=arguments.owner)
        space = spaces.find_active(session)
        total = outgoing.count_images(session, collection.id)
    header = _header(Kind.CORPUS, collection.name, space)
    rows = outgoing.corpus(collection.id, space)
    return _write(arguments.file, header, rows, total, lambda row: row, output)


def _export_outputs(arguments: argparse.Namespace, output: Output) -> Exit:
    with session_scope() as session:
        owner_id = None if arguments.owner is None else _owner(session, arguments.owner)
        space = spaces.find_active(session) if arguments.vectors else None
        chosen = outgoing.Chosen(owner_id, after=arguments.after, before=arguments.before)
        total = outgoing.count_outputs(session, chosen)

    def completed(row: Row) -> Row:
        row = outgoing.with_hash(row)
        return row if space is None else outgoing.with_vector(row, space)

    header = _header(Kind.OUTPUTS, None, space)
    return _write(arguments.file, header, outgoing.generated(chosen), total, completed, output)


def _header(kind: Kind, collection: str | None, space: Space | None) -> Header:
    if space is None:
        return Header(collection, None, None, None, kind)
    return Header(collection, space.digest, space.model, space.dim, kind)


def _write(
    path: Path, header: Header, rows: Iterator[Row], total: int, completed: Callable[[Row], Row], output: Output
) -> Exit:
    """All rows with their bytes; those whose bytes are gone or damaged are named and left out."""
    missing = without_vector = 0
    with written(path, header) as file, _progress(output) as progress:
        task = progress.add_task("exporting", total=total)
        for row in rows:
            progress.advance(task)
            try:
                row["image"] = get_blobs().get(row.pop("blob_key"))
                row["thumbnail"] = get_blobs().get(row.pop("thumbnail_key"))
                row = completed(row)
            except (ResourceNotFoundError, InvalidImageError) as error:
                missing += 1
                output.error(f"image {row['id']} is left out: {error}")
                continue
            without_vector += row["embedding"] is None
            file.add(row)
    _told(file, path, without_vector, missing, output)
    return Exit.INCOMPLETE if missing else Exit.DONE


def _told(file: Writer, path: Path, without_vector: int, missing: int, output: Output) -> None:
    output.say(f"{file.rows} images, {without_vector} without a vector, {missing} left out: {path}")
    output.event("done", images=file.rows, without_vector=without_vector, missing=missing)


# --- in -----------------------------------------------------------------------------------------------------------


def _import(arguments: argparse.Namespace, output: Output) -> Exit:
    counts = Counter[str]()
    with opened(arguments.file) as (header, total, groups), _progress(output) as progress:
        task = progress.add_task("importing", total=total)
        name = arguments.collection or header.collection
        if name is None:
            # What was generated mixes with what it was generated from only where somebody says so.
            raise UsageError("these are outputs: name the --collection that is to remember them")
        with session_scope() as session:
            collection_id = _collection(session, name, owner=arguments.owner, made=True).id
            space = space_for(session, header)
        for rows in groups:
            counts.update(bring(rows, collection_id, space))
            progress.advance(task, len(rows))
    output.say(
        f"{counts['new']} images, {counts['existing']} were there already; "
        f"{counts['to_embed']} are embedded by the workers"
    )
    output.event("done", **{name: counts[name] for name in ("new", "existing", "to_embed")})
    return Exit.DONE


# --- both ---------------------------------------------------------------------------------------------------------


def _collection(session: Session, name: str, *, owner: str | None, made: bool = False) -> Collection:
    """The shared collection of that name, or an owner's own, made if asked.

    Raises:
        ResourceNotFoundError
    """
    if owner is None:
        collection = session.scalar(select(Collection).where(Collection.name == name, Collection.shared))
    else:
        owner_id = _owner(session, owner)
        if made:
            return owners.ensure_collection(session, name, owner_id=owner_id)
        collection = session.scalar(select(Collection).where(Collection.name == name, Collection.owner_id == owner_id))
    if collection is None:
        raise ResourceNotFoundError(
            f"There is no collection {name!r}" + ("." if owner else " for all: name its --owner.")
        )
    return collection


def _owner(session: Session, name: str) -> UUID:
    owner_id = session.scalar(select(Owner.id).where(Owner.name == name))
    if owner_id is None:
        raise ResourceNotFoundError(f"There is no owner {name!r}.")
    return owner_id


def _progress(output: Output) -> Progress:
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=output.console, disable=not output.shows_progress)


if __name__ == "__main__":
    main()
