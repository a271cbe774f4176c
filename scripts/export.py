"""A corpus into a Parquet file and back, with its vectors; `--help` teaches it by examples.

It speaks to the database and the blob store that the settings name, not to the API.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import func, select, tuple_
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from scripts.corpus_file import CorpusFileError, Header, Row, opened, written
from scripts.terminal import EXIT_CODES, Exit, Output, add_output_options, finish
from shared.contracts.common import ImageFormat
from shared.contracts.images import ImageState, UploadFields
from shared.db import blobs, images, owners, spaces
from shared.db.models import Collection, Image, Owner
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import BaseAppException, ResourceNotFoundError
from shared.storage import get_blobs, image_key, thumbnail_key

DESCRIPTION = """\
A collection into a Parquet file and back, with captions, tags, bytes and vectors, so that a corpus moves between
installations without being embedded again: searches give the same answers with the same scores.

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

  look at it with anything that reads Parquet
    python -c "import pyarrow.parquet as p; print(p.read_table('corpus.parquet', columns=['caption', 'tags']))"

Vectors are taken over when the file's embedding space is the active one there (or the first); otherwise the images are
embedded again by the workers.

{EXIT_CODES}"""

PAGE = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, told in (("corpus", "write a collection to a file"), ("import", "read a file into a collection")):
        command = commands.add_parser(name, help=told)
        command.add_argument("file", type=Path)
        command.add_argument("--owner", help="whose collection (default: the shared one's)")
        command.add_argument("--collection", default=None if name == "import" else "shared")
        add_output_options(command)
    arguments = parser.parse_args()
    output = Output(quiet=arguments.quiet, as_json=arguments.as_json)
    act = _export if arguments.command == "corpus" else _import
    finish(
        lambda: act(arguments, output),
        output,
        wrong=(CorpusFileError, ResourceNotFoundError, ValueError, OSError),
        stopped=BaseAppException,
        interrupted="Interrupted. An import goes on from here with the same command; an export begins again.",
    )


# --- out ----------------------------------------------------------------------------------------------------------


def _export(arguments: argparse.Namespace, output: Output) -> Exit:
    with session_scope() as session:
        collection = _collection(session, arguments.collection, owner=arguments.owner)
        space = spaces.find_active(session)
        total = session.scalar(select(func.count()).where(Image.collection_id == collection.id)) or 0
    if space is None:
        header = Header(collection.name, None, None, None)
    else:
        header = Header(collection.name, space.digest, space.model, space.dim)
    missing = without_vector = 0
    with written(arguments.file, header) as file, _progress(output) as progress:
        task = progress.add_task("exporting", total=total)
        for row in _rows(collection.id, space):
            progress.advance(task)
            try:
                row["image"] = get_blobs().get(row.pop("blob_key"))
                row["thumbnail"] = get_blobs().get(row.pop("thumbnail_key"))
            except ResourceNotFoundError as error:
                missing += 1
                output.error(f"image {row['id']} is left out: {error}")
                continue
            without_vector += row["embedding"] is None
            file.add(row)
    output.say(f"{file.rows} images, {without_vector} without a vector, {missing} left out: {arguments.file}")
    output.event("done", images=file.rows, without_vector=without_vector, missing=missing)
    return Exit.INCOMPLETE if missing else Exit.DONE


def _rows(collection_id: UUID, space: Space | None) -> Iterator[Row]:
    """Every image, oldest first, a page at a time; what is added meanwhile comes too."""
    last: tuple[Any, UUID] | None = None
    while True:
        with session_scope() as session:
            statement = select(Image).where(Image.collection_id == collection_id)
            if last is not None:
                statement = statement.where(tuple_(Image.created_at, Image.id) > last)
            page = session.scalars(statement.order_by(Image.created_at, Image.id).limit(PAGE)).all()
            vectors = {} if space is None else _vectors(session, space, [image.id for image in page])
        if not page:
            return
        last = (page[-1].created_at, page[-1].id)
        for image in page:
            embedding, norm = vectors.get(image.id, (None, None))
            yield {
                **{name: getattr(image, name) for name in _COPIED},
                "id": str(image.id),
                "attributes": json.dumps(image.attributes, ensure_ascii=False),
                "blob_key": image.blob_key,
                "thumbnail_key": image.thumbnail_key,
                "embedding": embedding,
                "norm": norm,
            }


_COPIED = (
    *("sha256", "format", "width", "height", "perceptual_hash"),
    *("caption", "tags", "source", "licence", "filename", "created_at"),
)


def _vectors(session: Session, space: Space, image_ids: Sequence[UUID]) -> dict[UUID, tuple[list[float], float]]:
    found = images.pinned(session, space, image_ids, None)
    return {image_id: (each.vector.tolist(), each.norm) for image_id, each in found.items()}


# --- in -----------------------------------------------------------------------------------------------------------


def _import(arguments: argparse.Namespace, output: Output) -> Exit:
    counts = Counter[str]()
    with opened(arguments.file) as (header, total, groups), _progress(output) as progress:
        task = progress.add_task("importing", total=total)
        name = arguments.collection or header.collection
        with session_scope() as session:
            collection_id = _collection(session, name, owner=arguments.owner, made=True).id
            space = _space_for(session, header)
        for rows in groups:
            counts.update(_bring(rows, collection_id, space))
            progress.advance(task, len(rows))
    output.say(
        f"{counts['new']} images, {counts['existing']} were there already; "
        f"{counts['to_embed']} are embedded by the workers"
    )
    output.event("done", **{name: counts[name] for name in ("new", "existing", "to_embed")})
    return Exit.DONE


def _space_for(session: Session, header: Header) -> Space | None:
    """The active space if the file's vectors are of it; the first space of an installation becomes the active one."""
    active = spaces.find_active(session)
    if header.space is None or (active is not None and active.digest != header.space):
        return None
    assert header.model is not None
    assert header.dim is not None
    return spaces.ensure(session, digest=header.space, model=header.model, dim=header.dim)


def _bring(rows: list[Row], collection_id: UUID, space: Space | None) -> Counter[str]:
    """One group, all or none."""
    with session_scope() as session:
        digests = [row["sha256"] for row in rows]
        there = select(Image.sha256).where(Image.collection_id == collection_id, Image.sha256.in_(digests))
        known = set(session.scalars(there))
        ids = {UUID(row["id"]) for row in rows}
        taken = set(session.scalars(select(Image.id).where(Image.id.in_(ids))))
        new = [_Incoming(row, taken) for row in rows if row["sha256"] not in known]
        # Bytes before rows, and claimed before that, so that nothing is swept in between.
        claim_id = blobs.claim(session, [key for each in new for key in (each.blob_key, each.thumbnail_key)])
    for each in new:
        each.store()
    counts = Counter(existing=len(rows) - len(new))
    with session_scope() as session:
        if not blobs.settle(session, claim_id):
            raise CorpusFileError("the blobs were swept before their rows were written: start again")
        for each in new:
            embedded = space is not None and each.row["embedding"] is not None
            statement = upsert(Image).values(
                collection_id=collection_id,
                state=ImageState.READY if embedded else ImageState.PENDING,
                **each.columns(),
            )
            added = session.scalar(
                statement.on_conflict_do_nothing(index_elements=["collection_id", "sha256"]).returning(Image.id)
            )
            if added is None:
                counts["existing"] += 1
                continue
            counts["new"] += 1
            counts["to_embed"] += not embedded
            if embedded:
                assert space is not None
                vector = np.asarray(each.row["embedding"], np.float32)
                values = {"image_id": added, "embedding": vector.tolist(), "norm": each.row["norm"]}
                session.execute(upsert(space.table).values(values))
        images.touch(session, collection_id)
    return counts


class _Incoming:
    """A row of the file as an image of this installation."""

    def __init__(self, row: Row, taken: set[UUID]) -> None:
        self.row = row
        self.format = ImageFormat(row["format"])
        if len(row["sha256"]) != 64 or not set(row["sha256"]) <= set("0123456789abcdef"):
            raise CorpusFileError(f"{row['sha256']!r} is no digest")
        self.blob_key = image_key(row["sha256"], self.format)
        self.thumbnail_key = thumbnail_key(row["sha256"])
        # Records of generations name images by id, so it stays unless another collection here has it.
        self._id = uuid4() if UUID(row["id"]) in taken else UUID(row["id"])
        self._size_bytes = len(row["image"])

    def store(self) -> None:
        """Store the bytes, unless another collection has this image: then its bytes, as they are, are of both."""
        there = get_blobs().info(self.blob_key)
        if there is None:
            get_blobs().put(self.blob_key, self.row["image"], media_type=self.format.media_type)
        else:
            self._size_bytes = there.size_bytes
        if not get_blobs().exists(self.thumbnail_key):
            get_blobs().put(self.thumbnail_key, self.row["thumbnail"], media_type=ImageFormat.WEBP.media_type)

    def columns(self) -> dict[str, Any]:
        fields = UploadFields.model_validate(
            {
                **{name: self.row[name] for name in ("caption", "tags", "source", "licence")},
                "attributes": json.loads(self.row["attributes"]),
            }
        )
        return {
            **{name: self.row[name] for name in _COPIED},
            **fields.model_dump(exclude={"collection"}),
            "id": self._id,
            "format": self.format.value,
            "blob_key": self.blob_key,
            "thumbnail_key": self.thumbnail_key,
            "size_bytes": self._size_bytes,
        }


# --- both ---------------------------------------------------------------------------------------------------------


def _collection(session: Session, name: str, *, owner: str | None, made: bool = False) -> Collection:
    """The shared collection of that name, or an owner's own, made if asked.

    Raises:
        ResourceNotFoundError
    """
    if owner is None:
        collection = session.scalar(select(Collection).where(Collection.name == name, Collection.shared))
    else:
        owner_id = session.scalar(select(Owner.id).where(Owner.name == owner))
        if owner_id is None:
            raise ResourceNotFoundError(f"There is no owner {owner!r}.")
        if made:
            return owners.ensure_collection(session, name, owner_id=owner_id)
        collection = session.scalar(select(Collection).where(Collection.name == name, Collection.owner_id == owner_id))
    if collection is None:
        raise ResourceNotFoundError(
            f"There is no collection {name!r}" + ("." if owner else " for all: name its --owner.")
        )
    return collection


def _progress(output: Output) -> Progress:
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=output.console, disable=not output.shows_progress)


if __name__ == "__main__":
    main()
