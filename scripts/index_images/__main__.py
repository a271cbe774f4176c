"""Bring images and what is said of them into a collection; `--help` teaches it by examples."""

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from watchfiles import Change, watch

from afterimage_client import Afterimage, AfterimageError, ImageDescription
from scripts.console import (
    EXIT_CODES,
    Exit,
    Output,
    add_output_options,
    add_service_options,
    collection_name,
    finish,
    service_of,
)
from scripts.index_images.sources import (
    DESCRIBING,
    NOT_AN_IMAGE,
    SIDECAR_SUFFIXES,
    Found,
    SourceError,
    file_in_folder,
    found_in,
    images_of,
    in_folder,
    is_candidate,
)
from scripts.index_images.upload import Entry, Outcome, Report, Uploader, pending, unembedded
from scripts.table_files import FORMATS, RowsError

DESCRIPTION = """\
Bring images and what is said of them into a collection, and wait until they are searchable.

SOURCE is one of
  a folder     read with its subfolders; beside NAME.jpg stand NAME.json with caption, tags, licence, source and
               attributes, or NAME.txt with the caption
  a table      CSV, TSV, JSONL or Parquet with a column `file`, relative to the table, and columns of the same names;
               TXT with one file per line
  a tar        a WebDataset: members as in a folder
PNG, JPEG and WebP are taken, by their content, which the service decodes. Files of other kinds are named, too, and are
no failure.

What the collection has already is not sent again, so an interrupted run is simply started again."""

EXAMPLES = f"""\
examples:
  a folder, with a word on where it comes from
    python -m scripts.index_images photos/ --source archive-2024 --licence CC-BY-4.0 --tag photo

  keep what was skipped and why, and read only what has changed the next time
    python -m scripts.index_images photos/ --report photos.report.jsonl

  a table whose columns have other names, into a collection of your own
    python -m scripts.index_images products.csv --column file=image_path --column caption=title --collection products

  a WebDataset
    python -m scripts.index_images starter/corpus.tar

  keep the collection in step with a folder until Ctrl-C, deletions included; the report tells the next time what was
  deleted while nobody watched
    python -m scripts.index_images photos/ --collection photos --watch --delete --report photos.report.jsonl

{EXIT_CODES}"""

NAMED = 20
LOOK_AGAIN_S = 0.2
WATCH_STEP_MS = 500


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.index_images",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder, table or tar")
    group = parser.add_argument_group("what is said of the images")
    group.add_argument("--collection", type=collection_name, default="shared", help="default: %(default)s")
    group.add_argument("--tag", action="append", default=[], help="for all, beside their own; may be repeated")
    group.add_argument("--licence", help="of those that do not say theirs")
    group.add_argument("--source", dest="origin", help="of those that do not say theirs")
    group.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help=f"column of a table with another name; fields: file, {', '.join(DESCRIBING)}",
    )
    group.add_argument("--format", choices=sorted(set(FORMATS.values())), help="of a table, if not by its name")
    group.add_argument("--update", action="store_true", help="bring up to date what is said of images already there")
    group = parser.add_argument_group("how")
    group.add_argument("--report", type=Path, metavar="FILE", help="what became of each file, as JSON Lines")
    group.add_argument("--parallel", type=int, default=4, help="uploads at a time (default: %(default)s)")
    group.add_argument("--max-file-mb", type=float, default=16, help="larger files are skipped (default: %(default)g)")
    group.add_argument(
        "--wait", type=float, default=600, metavar="SECONDS", help="for all to be searchable (default: %(default)g)"
    )
    group.add_argument("--watch", action="store_true", help="a folder: go on with what changes in it, until Ctrl-C")
    group.add_argument(
        "--delete",
        action="store_true",
        help="with --watch and --report: delete images whose file was deleted or changed, also before this start",
    )
    add_service_options(parser)
    add_output_options(parser)
    arguments = parser.parse_args()
    output = Output(quiet=arguments.quiet, as_json=arguments.as_json)
    finish(
        lambda: _run(arguments, output),
        output,
        wrong=(SourceError, RowsError, ValueError, OSError),
        stopped=AfterimageError,
    )


def _run(arguments: argparse.Namespace, output: Output) -> Exit:
    source: Path = arguments.source
    if not source.exists():
        raise SourceError(f"there is no {source}")
    if arguments.watch and not source.is_dir():
        raise SourceError("--watch is for folders")
    if arguments.delete and not (arguments.watch and arguments.report):
        raise SourceError("--delete is for --watch, and needs a --report to tell what was deleted while nobody watched")
    given = {"licence": arguments.licence, "source": arguments.origin, "tags": arguments.tag}
    defaults = {name: value for name, value in given.items() if value}
    with service_of(arguments) as service, Report(arguments.report) as report:
        uploader = Uploader(
            service,
            arguments.collection,
            report,
            ImageDescription.model_validate(defaults),
            update=arguments.update or arguments.watch,
            parallel=max(1, arguments.parallel),
            largest_bytes=int(arguments.max_file_mb * 2**20),
        )
        if arguments.watch:
            return _keep_in_step(uploader, source, output, delete=arguments.delete)
        skipped = index(uploader, found_in(source, columns=_columns(arguments), format=arguments.format), output)
        return _told(uploader, skipped, output, wait_s=arguments.wait)


def _columns(arguments: argparse.Namespace) -> dict[str, str]:
    columns = {}
    for pair in arguments.column:
        name, separator, column = pair.partition("=")
        if not separator or name not in ("file", *DESCRIBING):
            raise SourceError(f"--column {pair}: write FIELD=COLUMN with one of file, {', '.join(DESCRIBING)}")
        columns[name] = column
    return columns


def index(uploader: Uploader, files: Iterable[Found], output: Output) -> list[Entry]:
    """Bring the collection what it lacks of these files; what was skipped comes back.

    Raises:
        AfterimageError: the service refused or stayed away.
    """
    uploader.learn()
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    skipped = []
    with Progress(*columns, console=output.console, disable=not output.shows_progress) as progress:
        task = progress.add_task("indexing", total=None)
        for entry in uploader.run(files):
            progress.advance(task)
            output.event("file", **vars(entry))
            if entry.outcome is Outcome.SKIPPED:
                skipped.append(entry)
        done = sum(uploader.counts.values())
        progress.update(task, total=done, completed=done)
    return skipped


def wait_until_searchable(service: Afterimage, collection: str, *, timeout_s: float) -> bool:
    """Whether every image of the collection has been embedded, or cannot be, in time."""
    deadline = time.monotonic() + timeout_s
    while pending(service, collection):
        if time.monotonic() > deadline:
            return False
        service.sleep(LOOK_AGAIN_S)
    return True


def _told(uploader: Uploader, skipped: list[Entry], output: Output, *, wait_s: float) -> Exit:
    searchable = wait_s <= 0 or wait_until_searchable(uploader.service, uploader.collection, timeout_s=wait_s)
    failed = [image for image in unembedded(uploader.service, uploader.collection) if image.sha256 in uploader.known]
    counts = {outcome.value: uploader.counts[outcome] for outcome in Outcome}
    output.event("done", **counts, not_embedded=len(failed), searchable=searchable)
    output.say(", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number) or "nothing to index")
    for entry in skipped[:NAMED]:
        output.say(f"skipped {entry.file}: {entry.code}: {entry.detail}")
    if len(skipped) > NAMED:
        output.say(f"and {len(skipped) - NAMED} more; --report FILE keeps them all")
    for image in failed[:NAMED]:
        output.say(f"not searchable: {image.filename or image.id}: {image.error_code}")
    if not searchable:
        output.error(f"some images are not searchable after {wait_s:g} s: is an embed worker up?")
    # That photos stand beside other files is no failure.
    wrong = failed or any(entry.code != NOT_AN_IMAGE for entry in skipped)
    return Exit.DONE if searchable and not wrong else Exit.INCOMPLETE


# --- a folder that changes ----------------------------------------------------------------------------------------


def _keep_in_step(uploader: Uploader, folder: Path, output: Output, *, delete: bool) -> Exit:
    """Index the folder, then whatever changes in it, until interrupted."""
    folder = folder.resolve()
    known = uploader.report.contents if delete else {}
    if known and not any((folder / name).exists() for name in known):
        # An empty mount point, or another folder's report, would empty the collection.
        raise SourceError(f"none of the {len(known)} files of the report is in {folder}: nothing was deleted")
    changes = watch(folder, rust_timeout=WATCH_STEP_MS, yield_on_timeout=True, raise_interrupt=True)
    next(changes)  # it listens from here on, so nothing that happens during the first pass is missed
    contents: dict[str, str | None] = {}
    try:
        uploader.learn()
        _follow(uploader, in_folder(folder), contents, output)
        if delete:
            _delete(uploader, known, contents, output)
        output.say(f"{len(contents)} files; watching {folder}")
        output.event("watching", files=len(contents))
        for changed in changes:
            gone = [path for change, path in changed if change is Change.deleted]
            before = dict(contents)
            _follow(uploader, _touched(folder, {path for _, path in changed}), contents, output)
            for name in _names_below(folder, gone, contents):
                del contents[name]
            if delete:
                _delete(uploader, before, contents, output)
    except KeyboardInterrupt:
        output.event("done", **{outcome.value: uploader.counts[outcome] for outcome in Outcome})
    return Exit.DONE


def _follow(uploader: Uploader, files: Iterable[Found], contents: dict[str, str | None], output: Output) -> None:
    for entry in uploader.run(files):
        contents[entry.file] = entry.sha256
        output.event("file", **vars(entry))
        if entry.outcome in (Outcome.CREATED, Outcome.UPDATED):
            output.say(f"{entry.outcome.value} {entry.file}")
        elif entry.outcome is Outcome.SKIPPED:
            output.say(f"skipped {entry.file}: {entry.code}: {entry.detail}")


def _delete(uploader: Uploader, before: dict[str, str | None], now: dict[str, str | None], output: Output) -> None:
    """Forget the contents that no file has any more."""
    left = set(now.values())
    for name, sha256 in before.items():
        if sha256 is not None and sha256 not in left and uploader.forget(sha256):
            output.say(f"deleted what was {name}")
            output.event("file", file=name, outcome=Outcome.DELETED, sha256=sha256)
        if name not in now:
            uploader.report.gone(name)


def _touched(folder: Path, changed: set[str]) -> Iterator[Found]:
    """The files that these changes concern: themselves, those beside a sidecar, those in a folder that came whole."""
    paths = set()
    for path in map(Path, changed):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir():
            yield from in_folder(folder, below=path)
        elif path.suffix.lower() in SIDECAR_SUFFIXES:
            paths |= {*images_of(path)}
        elif is_candidate(path):
            paths.add(path)
    for path in sorted(paths):
        if path.is_file():
            yield file_in_folder(path, folder)


def _names_below(folder: Path, gone: list[str], contents: dict[str, str | None]) -> list[str]:
    """The files that went with these paths, some of which may be folders."""
    names = []
    for path in map(Path, gone):
        name = path.relative_to(folder).as_posix()
        names += [known for known in contents if known == name or known.startswith(f"{name}/")]
    return [name for name in dict.fromkeys(names) if not (folder / name).exists()]


if __name__ == "__main__":
    main()
