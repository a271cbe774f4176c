"""Index a folder, then every change in it, until interrupted."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from watchfiles import Change, watch

from scripts.console import ConsoleOutput, ExitCode
from scripts.index_images.report import Outcome
from scripts.index_images.sources import (
    SIDECAR_SUFFIXES,
    SourceError,
    SourceFile,
    files_in_folder,
    images_beside,
    is_candidate,
    sidecars_in,
    source_file,
)
from scripts.index_images.upload import Uploader

WATCH_STEP_MS = 500

Contents = dict[str, str | None]
"""sha256 by file name; None when the file was skipped before its digest was computed."""


def watch_folder(uploader: Uploader, folder: Path, output: ConsoleOutput, *, delete: bool) -> ExitCode:
    """Index the folder, then every change in it, until interrupted.

    delete: delete images from the collection when no file has their content any more.

    Raises:
        SourceError: `delete`, and the folder has none of the files that the report lists.
        AfterimageError: the service refused a request or did not answer.
    """
    folder = folder.resolve()
    reported = uploader.report.contents if delete else {}
    if reported and not any((folder / name).exists() for name in reported):
        # With an empty mount point, or another folder's report, every image of the collection would be deleted.
        raise SourceError(f"all {len(reported)} files of the report are missing from {folder}: nothing was deleted")
    changes = watch(folder, rust_timeout=WATCH_STEP_MS, yield_on_timeout=True, raise_interrupt=True)
    next(changes)  # starts the watcher, so that changes during the first pass are not missed
    contents: Contents = {}
    try:
        uploader.load_known_images()
        _index_files(uploader, files_in_folder(folder, max_file_bytes=uploader.max_file_bytes), contents, output)
        if delete:
            _delete_images(uploader, reported, contents, output)
        output.info(f"{len(contents)} files; watching {folder}")
        output.event("watching", files=len(contents))
        for changed in changes:
            deleted = [path for change, path in changed if change is Change.deleted]
            before = dict(contents)
            _index_files(uploader, _changed_files(uploader, folder, {path for _, path in changed}), contents, output)
            for name in _names_below(folder, deleted, contents):
                del contents[name]
            if delete:
                _delete_images(uploader, before, contents, output)
    except KeyboardInterrupt:
        output.event("done", **{outcome.value: uploader.counts[outcome] for outcome in Outcome})
    return ExitCode.DONE


def _index_files(uploader: Uploader, files: Iterable[SourceFile], contents: Contents, output: ConsoleOutput) -> None:
    for entry in uploader.run(files):
        contents[entry.file] = entry.sha256
        output.event("file", **vars(entry))
        if entry.outcome in (Outcome.CREATED, Outcome.UPDATED):
            output.info(f"{entry.outcome.value} {entry.file}")
        elif entry.outcome is Outcome.SKIPPED:
            output.info(f"skipped {entry.file}: {entry.code}: {entry.detail}")


def _delete_images(uploader: Uploader, before: Contents, now: Contents, output: ConsoleOutput) -> None:
    """Delete images whose content a file had `before`, and no file has `now`."""
    remaining = set(now.values())
    for name, sha256 in before.items():
        if sha256 is not None and sha256 not in remaining and uploader.delete_image(sha256):
            output.info(f"deleted the image of {name}")
            output.event("file", file=name, outcome=Outcome.DELETED, sha256=sha256)
        if name not in now:
            uploader.report.add_deleted(name)


def _changed_files(uploader: Uploader, folder: Path, changed: set[str]) -> Iterator[SourceFile]:
    """Yield changed files, images beside a changed sidecar, and the files of a new folder."""
    paths = set()
    for path in map(Path, changed):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir():
            yield from files_in_folder(folder, below=path, max_file_bytes=uploader.max_file_bytes)
        elif path.suffix.lower() in SIDECAR_SUFFIXES:
            paths |= {*images_beside(path)}
        elif is_candidate(path):
            paths.add(path)
    for path in sorted(paths):
        if path.is_file():
            yield source_file(path, folder, sidecars_in(path.parent), max_file_bytes=uploader.max_file_bytes)


def _names_below(folder: Path, deleted: list[str], contents: Contents) -> list[str]:
    """Return the names of files that were deleted: at these paths, or in folders at these paths."""
    names = []
    for path in map(Path, deleted):
        name = path.relative_to(folder).as_posix()
        names += [known for known in contents if known == name or known.startswith(f"{name}/")]
    return [name for name in dict.fromkeys(names) if not (folder / name).exists()]
