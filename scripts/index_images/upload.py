"""Bring a collection what it lacks, in parallel, and say what became of each file."""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any
from uuid import UUID

import pydantic

from afterimage_client import (
    Afterimage,
    ImageDescription,
    ImageFile,
    ImagePatch,
    ImageState,
    ImageView,
    InvalidRequestError,
    OnInvalid,
    UploadedFile,
    UploadFields,
)
from scripts.index_images.sources import DESCRIBING, Found, Sample, SkippedError

FILES_AT_ONCE = 8
BYTES_AT_ONCE = 4 * 2**20
"""In one request: what each costs beside its images is shared, and none keeps others waiting for long."""

Known = tuple[UUID, dict[str, Any]]
"""An image of the collection, and what is said of it."""


BY_CIRCUMSTANCE = ("file_unreadable", "image_too_large", "body_too_large")
"""Why a file was skipped that may be taken another time, though it is the same: who may read it, and limits, change."""


class Outcome(StrEnum):
    CREATED = "created"
    EXISTING = "existing"  # the collection had it
    UPDATED = "updated"  # the collection had it, and other things were said of it
    DUPLICATE = "duplicate"  # another file of this run has the same content
    SKIPPED = "skipped"  # `code` and `detail` say why
    DELETED = "deleted"  # there is no such file any more


@dataclass(frozen=True)
class Entry:
    """What became of a file."""

    file: str
    outcome: Outcome
    sha256: str | None = None
    code: str | None = None
    detail: str | None = None
    stamp: str | None = None


@dataclass(frozen=True)
class _ToSend:
    """A content that the collection lacks."""

    found: Found
    sample: Sample = field(repr=False)
    sha256: str
    description: ImageDescription


class Report:
    """Entries as JSON Lines, also for the next run: a file that has not changed since is not looked at again."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, Entry] = {}
        self._file: IO[str] | None = None
        if path is not None and path.exists():
            *lines, _ = path.read_text(encoding="utf-8").split("\n")  # the last of a killed run may be half a line
            for line in lines:
                self._keep(_entry(json.loads(line)))

    @property
    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    @property
    def contents(self) -> dict[str, str | None]:
        """The files that it tells of, and what was in them."""
        return {name: entry.sha256 for name, entry in self._entries.items()}

    def settled(self, found: Found, *, known: Mapping[str, Known]) -> Entry | None:
        """What an earlier run said of a file, if that still holds."""
        entry = self._entries.get(found.name)
        if entry is None or found.stamp is None or entry.stamp != found.stamp:
            return None
        if entry.outcome == Outcome.SKIPPED:
            return None if entry.code in BY_CIRCUMSTANCE else entry
        return replace(entry, outcome=Outcome.EXISTING) if entry.sha256 in known else None

    def __enter__(self) -> "Report":
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Written anew, so that each file stands in it once; then line by line as things happen.
            self._file = self._path.open("w", encoding="utf-8")
            for entry in self._entries.values():
                self._write(entry)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, entry: Entry) -> None:
        before = self._entries.get(entry.file)
        # That it is there by now is no news of a file that an earlier run has brought.
        brought = before is not None and entry.outcome is Outcome.EXISTING and before.sha256 == entry.sha256
        if before != entry and not brought:
            self._keep(entry)
            self._write(entry)

    def gone(self, file: str) -> None:
        """That file is not there any more."""
        if file in self._entries:
            self.add(Entry(file, Outcome.DELETED))

    def _keep(self, entry: Entry) -> None:
        if entry.outcome is Outcome.DELETED:
            self._entries.pop(entry.file, None)
        else:
            self._entries[entry.file] = entry

    def _write(self, entry: Entry) -> None:
        if self._file is not None:
            self._file.write(json.dumps(asdict(entry)) + "\n")
            self._file.flush()


@dataclass
class Uploader:
    """Uploads into one collection.

    Attributes:
        defaults: said of every image; tags are added, other fields are for images whose source does not say them.
        update: whether what is said of an image that the collection has is brought up to date.
    """

    service: Afterimage
    collection: str
    report: Report
    defaults: ImageDescription = field(default_factory=ImageDescription)
    update: bool = False
    parallel: int = 4
    largest_bytes: int = 16 * 2**20
    counts: Counter[Outcome] = field(default_factory=Counter)
    known: dict[str, Known] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def learn(self) -> None:
        """Ask which images the collection has; one that could not be embedded is worth another try."""
        for image in _listed(self.service, self.collection):
            if image.state is not ImageState.FAILED:
                self.known[image.sha256] = (image.id, {name: getattr(image, name) for name in DESCRIBING})

    def run(self, files: Iterable[Found]) -> Iterator[Entry]:
        """What becomes of each file, as it becomes so.

        Raises:
            AfterimageError: the service refused, or stayed away.
        """
        self._taken.clear()
        pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="upload")
        working: set[Future[list[Entry]]] = set()
        remaining = iter(files)
        try:
            while group := list(islice(remaining, FILES_AT_ONCE)):
                working.add(pool.submit(self._bring, group))
                if len(working) >= 2 * self.parallel:
                    done, working = wait(working, return_when=FIRST_COMPLETED)
                    yield from self._told(done)
            while working:
                done, working = wait(working, return_when=FIRST_COMPLETED)
                yield from self._told(done)
        except BaseException:
            self.service.close()  # ends the pauses of the threads, which the pool waits for
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def forget(self, sha256: str) -> bool:
        """Delete the image with that content from the collection; whether there was one."""
        known = self.known.pop(sha256, None)
        if known is not None:
            self.service.images.delete(known[0])
            self.counts[Outcome.DELETED] += 1
        self._taken.discard(sha256)
        return known is not None

    def _told(self, done: Iterable[Future[list[Entry]]]) -> Iterator[Entry]:
        for entry in chain.from_iterable(each.result() for each in done):
            self.counts[entry.outcome] += 1
            self.report.add(entry)
            yield entry

    def _bring(self, group: Sequence[Found]) -> list[Entry]:
        """What became of these files; those that the collection lacks go to it together."""
        entries: list[Entry] = []
        to_send: list[_ToSend] = []
        for found in group:
            entry = self.report.settled(found, known=self.known)
            if entry is None or self.update:
                entry = self._looked_at(found, to_send)
            if entry is not None:
                entries.append(entry)
            elif sum(len(each.sample.data) for each in to_send) >= BYTES_AT_ONCE:
                entries += self._sent(to_send)
                to_send = []
        return entries + self._sent(to_send)

    def _looked_at(self, found: Found, to_send: list[_ToSend]) -> Entry | None:
        """What becomes of the file; None when it is to be sent."""
        sha256 = None
        try:
            sample = found.read()
            if not sample.data:
                raise SkippedError("empty_file", "it is empty")
            if len(sample.data) > self.largest_bytes:
                raise SkippedError("image_too_large", f"{len(sample.data)} bytes are more than {self.largest_bytes}")
            sha256 = sample.sha256
            description = self._description(sample)
            outcome = self._known_outcome(sha256, description)
        except SkippedError as error:
            return Entry(found.name, Outcome.SKIPPED, sha256, error.code, str(error), found.stamp)
        except InvalidRequestError as error:
            return Entry(found.name, Outcome.SKIPPED, sha256, error.code, error.detail, found.stamp)
        if outcome is None:
            to_send.append(_ToSend(found, sample, sha256, description))
            return None
        return Entry(found.name, outcome, sha256, stamp=found.stamp)

    def _known_outcome(self, sha256: str, description: ImageDescription) -> Outcome | None:
        """What becomes of a content that this run or the collection has already; None when neither has."""
        with self._lock:
            known = self.known.get(sha256)
            if sha256 in self._taken:
                return Outcome.DUPLICATE
            self._taken.add(sha256)
        if known is None:
            return None
        image_id, before = known
        patch = {name: value for name, value in _said(description).items() if before.get(name) != value}
        if not self.update or not patch:
            return Outcome.EXISTING
        self.service.images.change(image_id, ImagePatch.model_validate(patch))
        self.known[sha256] = (image_id, before | patch)
        return Outcome.UPDATED

    def _sent(self, to_send: Sequence[_ToSend]) -> list[Entry]:
        if not to_send:
            return []
        fields = UploadFields(
            collection=self.collection, on_invalid=OnInvalid.SKIP, each=[each.description for each in to_send]
        )
        try:
            answer = self.service.images.upload(
                [ImageFile(each.sample.filename, each.sample.data) for each in to_send], fields
            )
        except InvalidRequestError as error:
            if len(to_send) > 1:  # together they are more than the service takes, or one of them is refused
                return [entry for each in to_send for entry in self._sent([each])]
            (only,) = to_send
            self._taken.discard(only.sha256)
            return [Entry(only.found.name, Outcome.SKIPPED, only.sha256, error.code, error.detail, only.found.stamp)]
        except BaseException:
            self._taken.difference_update(each.sha256 for each in to_send)
            raise
        return [self._became(each, file) for each, file in zip(to_send, answer.files, strict=True)]

    def _became(self, sent: _ToSend, file: UploadedFile) -> Entry:
        if file.image_id is not None:
            self.known[sent.sha256] = (file.image_id, _said(sent.description))
        else:
            self._taken.discard(sent.sha256)
        outcome = Outcome(file.outcome.value)
        return Entry(sent.found.name, outcome, sent.sha256, file.code, file.detail, sent.found.stamp)

    def _description(self, sample: Sample) -> ImageDescription:
        said = {name: sample.fields[name] for name in DESCRIBING if sample.fields.get(name)}
        if isinstance(said.get("tags"), str):
            said["tags"] = _tags(said["tags"])
        if isinstance(said.get("attributes"), str):
            said["attributes"] = _object(said["attributes"])
        if isinstance(said.get("attributes"), dict):
            said["attributes"] = {str(name): str(value) for name, value in said["attributes"].items()}
        defaults = self.defaults.model_dump(exclude_unset=True)
        common = defaults.pop("tags", [])
        try:
            own = ImageDescription.model_validate(said)
            tags = list(dict.fromkeys([*own.tags, *common]))
            return ImageDescription.model_validate({**defaults, **said, "tags": tags})
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise SkippedError("invalid_description", f"{where}: {first['msg']}") from None


def pending(service: Afterimage, collection: str) -> bool:
    """Whether an image of the collection waits for its vector."""
    return next(_listed(service, collection, state=ImageState.PENDING, page_size=1), None) is not None


def unembedded(service: Afterimage, collection: str) -> Iterator[ImageView]:
    """Images of the collection that have got no vector and will get none."""
    return _listed(service, collection, state=ImageState.FAILED)


def _listed(service: Afterimage, collection: str, **options: Any) -> Iterator[ImageView]:
    """The images of a collection; none of one that the first upload will make."""
    try:
        yield from service.images.list(collection=collection, **options)
    except InvalidRequestError as error:
        if [mistake.field for mistake in error.errors] != ["query.collection"]:
            raise


def _said(description: ImageDescription) -> dict[str, Any]:
    return {name: getattr(description, name) for name in DESCRIBING if name in description.model_fields_set}


def _entry(line: dict[str, Any]) -> Entry:
    return Entry(**line | {"outcome": Outcome(line["outcome"])})


def _tags(text: str) -> Any:
    if text.startswith("["):
        return _object(text)
    return [tag for tag in (part.strip() for part in text.split(",")) if tag]


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
