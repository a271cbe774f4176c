"""Write a collection, or outputs, to a Parquet file."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.console import ConsoleOutput, ExitCode
from scripts.export import rows
from scripts.export.image_file import Header, Kind, Row, Writer, write_image_file
from scripts.export.lookup import get_collection, get_owner_id, progress_bar
from shared.db import spaces
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import InvalidImageError, ResourceNotFoundError
from shared.storage import get_blobs


def export_corpus(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    """Write a collection to `arguments.file`.

    Raises:
        ResourceNotFoundError: the owner or the collection does not exist.
    """
    with session_scope() as session:
        collection = get_collection(session, arguments.collection, owner=arguments.owner)
        space = spaces.find_active(session)
        total = rows.count_images(session, collection.id)
    header = _header(Kind.CORPUS, collection.name, space)
    images = rows.corpus_rows(collection.id, space)
    return _write(arguments.file, header, images, total, lambda row: row, output)


def export_outputs(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    """Write the outputs of one owner or of all owners to `arguments.file`.

    Raises:
        ResourceNotFoundError: the owner does not exist.
        EmbeddingUnavailableError: `--vectors`, and no embed worker answers.
    """
    with session_scope() as session:
        owner_id = None if arguments.owner is None else get_owner_id(session, arguments.owner)
        space = spaces.find_active(session) if arguments.vectors else None
        selection = rows.OutputSelection(owner_id, after=arguments.after, before=arguments.before)
        total = rows.count_outputs(session, selection)

    def completed(row: Row) -> Row:
        row = rows.with_hash(row)
        return row if space is None else rows.with_vector(row, space)

    header = _header(Kind.OUTPUTS, None, space)
    return _write(arguments.file, header, rows.output_rows(selection), total, completed, output)


def _header(kind: Kind, collection: str | None, space: Space | None) -> Header:
    if space is None:
        return Header(collection, None, None, None, kind)
    return Header(collection, space.digest, space.model, space.dim, kind)


def _write(
    path: Path,
    header: Header,
    images: Iterator[Row],
    total: int,
    completed: Callable[[Row], Row],
    output: ConsoleOutput,
) -> ExitCode:
    """Write all rows with their bytes. Images whose bytes are missing or damaged are listed and left out."""
    missing = without_vector = 0
    with write_image_file(path, header) as file, progress_bar(output) as progress:
        task = progress.add_task("exporting", total=total)
        for row in images:
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
    _print_summary(file, path, without_vector, missing, output)
    return ExitCode.INCOMPLETE if missing else ExitCode.DONE


def _print_summary(file: Writer, path: Path, without_vector: int, missing: int, output: ConsoleOutput) -> None:
    output.info(f"{file.rows} images, {without_vector} without a vector, {missing} left out: {path}")
    output.event("done", images=file.rows, without_vector=without_vector, missing=missing)
