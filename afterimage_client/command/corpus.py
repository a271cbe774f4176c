"""`afterimage search` and `afterimage upload`."""

import base64
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from afterimage_client.command.output import Context, ExitCode, table, with_service
from afterimage_client.errors import InvalidInputError
from afterimage_client.images import ImageFile
from afterimage_client.requests import build_request, read_file
from shared.contracts.common import OnInvalid
from shared.contracts.images import FileOutcome, ImageState, UploadFields
from shared.contracts.search import SearchMode, SearchRequest

FILES_PER_REQUEST = 8
POLL_S = 0.2


@click.command()
@click.argument("text", required=False)
@click.option("-i", "--image", metavar="FILE|ID", help="Image that the results resemble: a file, or a corpus image.")
@click.option("-k", default=10, show_default=True, help="Largest number of results.")
@click.option("--collection", metavar="NAME", help="[default: shared]")
@click.option("--tag", "tags", multiple=True, help="Tag that a result must have; may be repeated.")
@click.option("--threshold", type=float, metavar="COSINE", help="Lowest similarity of a result.")
@click.option("--mode", type=click.Choice([mode.value for mode in SearchMode]), help="By similarity, words, or both.")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to save the images in.")
@with_service
def search(
    context: Context,
    /,
    *,
    text: str | None,
    image: str | None,
    collection: str | None,
    tags: tuple[str, ...],
    out: Path | None,
    **fields: Any,
) -> int:
    """Find images of the corpus by TEXT, by an image, or by both.

    \b
        afterimage search "a cat playing" --collection photos -k 5
        afterimage search --image sketch.png --out found/
    """
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if text is not None:
        given["query"] = text
    if image is not None:
        given |= _image(image)
    given["filter"] = ({"collection": collection} if collection else {}) | ({"tags": tags} if tags else {})
    found = context.service.search(build_request(SearchRequest, **given))
    rows = []
    for result in found.results:
        file = None
        if out is not None:
            image_view = context.service.images.get(result.image_id)
            file = out / f"{result.image_id}.{image_view.format}"
            context.service.images.download(image_view, file)
        similarity = "" if result.similarity is None else f"{result.similarity:.3f}"
        rows.append([similarity, result.image_id, result.caption, ", ".join(result.tags), *([file] if out else [])])
    context.result(found, *(table(rows) if rows else ["nothing was found"]))
    return ExitCode.DONE


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--caption", help="For people, for the search by words, and for models that read captions.")
@click.option("--tag", "tags", multiple=True, help="May be repeated.")
@click.option("--collection", metavar="NAME", help="Created if it does not exist [default: shared].")
@click.option("--licence")
@click.option("--source")
@click.option("--wait", is_flag=True, help="Wait until the images are searchable.")
@with_service
def upload(context: Context, /, *, files: tuple[Path, ...], wait: bool, **fields: Any) -> int:
    """Add image FILES to the corpus. A file that the collection already has is not added again.

    For folders, tables and archives with descriptions, use `python -m scripts.index_images`.
    """
    given = {name: value for name, value in fields.items() if value not in (None, ())}
    description = build_request(UploadFields, **given, on_invalid=OnInvalid.SKIP)
    paths = [*files]
    skipped, added = 0, list[UUID]()
    bar = click.progressbar(length=len(paths), label="uploading", file=sys.stderr) if context.shows_progress else None
    with bar or nullcontext():
        for start in range(0, len(paths), FILES_PER_REQUEST):
            group = paths[start : start + FILES_PER_REQUEST]
            answer = context.service.images.upload(
                [ImageFile(each.name, read_file(each)) for each in group], description
            )
            for path, each in zip(group, answer.files, strict=True):
                skipped += each.outcome is FileOutcome.SKIPPED
                added += [each.image_id] if each.image_id else []
                line = f"{each.outcome.value:<9} {each.image_id or ''}  {path}" if each.image_id else ""
                reason = f"skipped   {path}: {each.code}: {each.detail}"
                context.result({"file": str(path), **each.model_dump(mode="json")}, line or reason)
            if bar is not None:
                bar.update(len(group))
    failed = _wait_until_searchable(context, added) if wait else 0
    return ExitCode.INCOMPLETE if skipped or failed else ExitCode.DONE


def _wait_until_searchable(context: Context, images: list[UUID]) -> int:
    """Wait for the vectors of the images, and return how many could not be computed."""
    failed = 0
    for image_id in images:
        while (image := context.service.images.get(image_id)).state is ImageState.PENDING:
            context.service.sleep(POLL_S)
        if image.state is ImageState.FAILED:
            failed += 1
            context.note(f"not searchable: {image.filename or image.id}: {image.error_code}")
    return failed


def _image(text: str) -> dict[str, Any]:
    try:
        return {"image_id": UUID(text)}
    except ValueError:
        pass
    if text.startswith("-"):
        raise InvalidInputError(f"--image {text}: name a file or an id")
    return {"image": base64.b64encode(read_file(Path(text))).decode()}
