"""Read a Parquet file of images into a collection."""

import argparse
from collections import Counter

from scripts.console import ConsoleOutput, ExitCode
from scripts.export.image_file import open_image_file
from scripts.export.import_rows import import_rows, space_for_import
from scripts.export.lookup import get_or_create_collection, progress_bar
from shared.db.session import session_scope


class UsageError(Exception):
    """The options do not fit the file."""


def import_file(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    """Add the images of `arguments.file` to a collection; images that the collection already has are not changed.

    Raises:
        ImageFileError: the file was not written by `scripts.export`, or is damaged.
        UsageError: a file of outputs, and no `--collection`.
        ResourceNotFoundError: the owner or the shared collection does not exist.
    """
    counts = Counter[str]()
    with open_image_file(arguments.file) as (header, total, groups), progress_bar(output) as progress:
        task = progress.add_task("importing", total=total)
        name = arguments.collection or header.collection
        if name is None:
            # Outputs join a corpus only on request, because new images would be generated from generated ones.
            raise UsageError("this is a file of outputs: name the --collection for its images")
        with session_scope() as session:
            collection_id = get_or_create_collection(session, name, owner=arguments.owner).id
            space = space_for_import(session, header)
        for rows in groups:
            counts.update(import_rows(rows, collection_id, space))
            progress.advance(task, len(rows))
    output.info(
        f"{counts['new']} images imported, {counts['existing']} already there, {counts['withdrawn']} withdrawn; "
        f"the workers embed {counts['to_embed']} of them"
    )
    output.event("done", **{name: counts[name] for name in ("new", "existing", "withdrawn", "to_embed")})
    return ExitCode.DONE
