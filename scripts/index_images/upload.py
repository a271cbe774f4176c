"""Upload images that a collection lacks, in parallel, and record the result of each file."""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from uuid import UUID

import pydantic

from afterimage_client import (
    Afterimage,
    FileOutcome,
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
from scripts.index_images.report import Outcome, Report, ReportEntry
from scripts.index_images.sources import DESCRIPTION_FIELDS, Sample, SkippedFileError, SourceFile
from scripts.table_files import json_text

FILES_PER_REQUEST = 8
BYTES_PER_REQUEST = 4 * 2**20
"""Large enough to share the fixed cost of a request, small enough not to delay other clients."""

KnownImage = tuple[UUID, ImageDescription | None]
"""Id of an image of the collection, and what its file said last; None if that is not known."""


@dataclass(frozen=True)
class _NewImage:
    """An image that the collection lacks."""

    file: SourceFile
    sample: Sample = field(repr=False)
    sha256: str
    description: ImageDescription


@dataclass
class Uploader:
    """Uploads into one collection.

    Attributes:
        defaults: description of every image. Its tags are added; its other fields fill those that the source lacks.
        update: update the descriptions of images that the collection already has.
        max_file_bytes: for the sources of its files, which do not read larger images.
        known_images: the collection's images by sha256.
    """

    service: Afterimage
    collection: str
    report: Report
    defaults: ImageDescription = field(default_factory=ImageDescription)
    update: bool = False
    parallel: int = 4
    max_file_bytes: int = 16 * 2**20
    counts: Counter[Outcome] = field(default_factory=Counter)
    known_images: dict[str, KnownImage] = field(default_factory=dict)
    _seen_sha256: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def load_known_images(self) -> None:
        """List the collection's images. Images that failed are left out, so that they are uploaded again."""
        for image in _list_images(self.service, self.collection):
            if image.state is not ImageState.FAILED:
                self.known_images[image.sha256] = (image.id, image.file_description)

    def run(self, files: Iterable[SourceFile]) -> Iterator[ReportEntry]:
        """Index the files and yield the entry of each when it is finished.

        Raises:
            AfterimageError: the service refused a request or did not answer.
        """
        self._seen_sha256.clear()
        pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="upload")
        working: set[Future[list[ReportEntry]]] = set()
        remaining = iter(files)
        try:
            while group := _next_group(remaining):
                working.add(pool.submit(self._index_group, group))
                if len(working) >= 2 * self.parallel:
                    done, working = wait(working, return_when=FIRST_COMPLETED)
                    yield from self._record(done)
            while working:
                done, working = wait(working, return_when=FIRST_COMPLETED)
                yield from self._record(done)
        except BaseException:
            self.service.close()  # interrupts the pauses of the threads, so that the pool can end
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def delete_image(self, sha256: str) -> bool:
        """Delete the image with this digest from the collection; return False if the collection does not have it."""
        known = self.known_images.pop(sha256, None)
        if known is not None:
            self.service.images.delete(known[0])
            self.counts[Outcome.DELETED] += 1
        self._seen_sha256.discard(sha256)
        return known is not None

    def _record(self, done: Iterable[Future[list[ReportEntry]]]) -> Iterator[ReportEntry]:
        for entry in chain.from_iterable(future.result() for future in done):
            self.counts[entry.outcome] += 1
            self.report.add(entry)
            yield entry

    def _index_group(self, group: Sequence[SourceFile]) -> list[ReportEntry]:
        """Index these files. Images that the collection lacks share requests."""
        entries: list[ReportEntry] = []
        new_images: list[_NewImage] = []
        for file in group:
            entry = self.report.find_unchanged(file, known=self.known_images)
            if entry is None or self.update:
                entry = self._check_file(file, new_images)
            if entry is not None:
                entries.append(entry)
            elif sum(len(image.sample.data) for image in new_images) >= BYTES_PER_REQUEST:
                entries += self._upload(new_images)
                new_images = []
        return entries + self._upload(new_images)

    def _check_file(self, file: SourceFile, new_images: list[_NewImage]) -> ReportEntry | None:
        """Read the file. Return its entry, or None after adding it to `new_images` for an upload."""
        sha256 = None
        try:
            sample = file.read()
            if not sample.data:
                raise SkippedFileError("empty_file", "the file is empty")
            sha256 = sample.sha256
            description = self._description(sample)
            outcome = self._known_outcome(sha256, description)
        except SkippedFileError as error:
            return ReportEntry(file.name, Outcome.SKIPPED, sha256, error.code, str(error), file.stamp)
        except InvalidRequestError as error:
            return ReportEntry(file.name, Outcome.SKIPPED, sha256, error.code, error.reason, file.stamp)
        if outcome is None:
            new_images.append(_NewImage(file, sample, sha256, description))
            return None
        return ReportEntry(file.name, outcome, sha256, stamp=file.stamp)

    def _known_outcome(self, sha256: str, description: ImageDescription) -> Outcome | None:
        """Return the outcome for an image that this run or the collection already has; None for a new image.

        With `update`, apply what changed in the file to the collection's image first. The service keeps what people
        have set or removed.
        """
        with self._lock:
            known = self.known_images.get(sha256)
            if sha256 in self._seen_sha256:
                return Outcome.DUPLICATE
            self._seen_sha256.add(sha256)
        if known is None:
            return None
        image_id, before = known
        if not self.update or before == description:
            return Outcome.EXISTING
        self.service.images.change(image_id, ImagePatch(file_description=description))
        self.known_images[sha256] = (image_id, description)
        return Outcome.UPDATED

    def _upload(self, new_images: Sequence[_NewImage]) -> list[ReportEntry]:
        if not new_images:
            return []
        fields = UploadFields(
            collection=self.collection, on_invalid=OnInvalid.SKIP, each=[image.description for image in new_images]
        )
        try:
            answer = self.service.images.upload(
                [ImageFile(image.sample.filename, image.sample.data) for image in new_images], fields
            )
        except InvalidRequestError as error:
            if len(new_images) > 1:  # the request is too large, or the service refuses one of the images
                return [entry for image in new_images for entry in self._upload([image])]
            (image,) = new_images
            self._seen_sha256.discard(image.sha256)
            return [
                ReportEntry(image.file.name, Outcome.SKIPPED, image.sha256, error.code, error.reason, image.file.stamp)
            ]
        except BaseException:
            self._seen_sha256.difference_update(image.sha256 for image in new_images)
            raise
        return [self._uploaded(image, file) for image, file in zip(new_images, answer.files, strict=True)]

    def _uploaded(self, image: _NewImage, uploaded: UploadedFile) -> ReportEntry:
        """Return the entry for the service's answer to one image."""
        if uploaded.image_id is not None:
            created = uploaded.outcome is FileOutcome.CREATED
            self.known_images[image.sha256] = (uploaded.image_id, image.description if created else None)
        else:
            self._seen_sha256.discard(image.sha256)
        outcome = Outcome(uploaded.outcome.value)
        return ReportEntry(image.file.name, outcome, image.sha256, uploaded.code, uploaded.detail, image.file.stamp)

    def _description(self, sample: Sample) -> ImageDescription:
        fields = {name: sample.fields[name] for name in DESCRIPTION_FIELDS if sample.fields.get(name)}
        if isinstance(fields.get("tags"), str):
            fields["tags"] = _parse_tags(fields["tags"])
        if isinstance(fields.get("attributes"), str):
            fields["attributes"] = _parse_json(fields["attributes"])
        if isinstance(fields.get("attributes"), dict):
            fields["attributes"] = {
                str(name): json_text(value) for name, value in fields["attributes"].items() if value is not None
            }
        defaults = self.defaults.model_dump(exclude_unset=True)
        common = defaults.pop("tags", [])
        try:
            own = ImageDescription.model_validate(fields)
            tags = list(dict.fromkeys([*own.tags, *common]))
            return ImageDescription.model_validate({**defaults, **fields, "tags": tags})
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise SkippedFileError("invalid_description", f"{where}: {first['msg']}") from None


def _next_group(files: Iterator[SourceFile]) -> list[SourceFile]:
    """Return the next files for one thread. Those of a tar are in memory, so their bytes are limited too."""
    group: list[SourceFile] = []
    for file in files:
        group.append(file)
        if len(group) >= FILES_PER_REQUEST or sum(each.held_bytes for each in group) >= BYTES_PER_REQUEST:
            break
    return group


def has_pending_images(service: Afterimage, collection: str) -> bool:
    """Return whether an image of the collection is not embedded yet."""
    return next(_list_images(service, collection, state=ImageState.PENDING, page_size=1), None) is not None


def list_failed_images(service: Afterimage, collection: str) -> Iterator[ImageView]:
    """Yield the images of the collection that could not be embedded."""
    return _list_images(service, collection, state=ImageState.FAILED)


def _list_images(service: Afterimage, collection: str, **options: Any) -> Iterator[ImageView]:
    """Yield the images of a collection. The first upload creates a missing collection, so it counts as empty."""
    try:
        yield from service.images.list(collection=collection, **options)
    except InvalidRequestError as error:
        if [problem.field for problem in error.errors] != ["query.collection"]:
            raise


def _parse_tags(text: str) -> Any:
    if text.startswith("["):
        return _parse_json(text)
    return [tag for tag in (part.strip() for part in text.split(",")) if tag]


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
