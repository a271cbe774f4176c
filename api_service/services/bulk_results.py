"""What a bulk has made, as streams that take no more memory for a hundred thousand items than for ten."""

import logging
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import orjson
from pydantic import BaseModel

from api_service.http.auth import Caller
from api_service.services import bulks as verbs
from api_service.services import views
from shared.contracts.bulks import BulkEnd, BulkManifestLine, ItemState
from shared.contracts.jobs import JobKind, JobView
from shared.db import bulks, outputs
from shared.db.session import session_scope
from shared.db.tables import BulkItem, Job
from shared.errors import BaseAppException, ResourceNotFoundError, StorageError
from shared.storage import get_blobs

logger = logging.getLogger(__name__)

LINES_AT_A_TIME = 100


def manifest(bulk_id: UUID, *, after: int, caller: Caller) -> Iterator[bytes]:
    """One line of JSON for each item behind that line, and one that says that these were all.

    The server ends a stream that breaks as if it were over, so that last line is how a reader knows.

    Raises:
        ResourceNotFoundError: at the call.
    """
    with session_scope() as session:
        bulks.get(session, bulk_id, owner_id=caller.owner_id)
    return _until_fault(_manifest(bulk_id, after, caller))


def archive(bulk_id: UUID, *, after: int, caller: Caller) -> Iterator[bytes]:
    """A tar of every image there is so far, each item's followed by its line of the manifest.

    The last member says that this was all: an archive without it was cut.

    Raises:
        ResourceNotFoundError: at the call.
    """
    with session_scope() as session:
        bulks.get(session, bulk_id, owner_id=caller.owner_id)
    return _until_fault(_archive(bulk_id, after, caller))


def _manifest(bulk_id: UUID, after: int, caller: Caller) -> Iterator[bytes]:
    count = 0
    for page in _pages(bulk_id, after, caller):
        count += len(page.lines)
        yield b"".join(_json(line) for line in page.lines)
    yield _json(BulkEnd(items=count))


def _archive(bulk_id: UUID, after: int, caller: Caller) -> Iterator[bytes]:
    count = 0
    for page in _pages(bulk_id, after, caller):
        for line in page.lines:
            gone: list[int] = []
            for output in line.outputs:
                name = f"{line.line:06d}-{output.index}.{output.format}"
                at_s = output.created_at.timestamp()
                try:
                    content = get_blobs().stream(page.blob_keys[output.id])
                except ResourceNotFoundError:
                    gone.append(output.index)
                else:
                    yield _member_head(name, output.size_bytes, at_s)
                    yield from _padded(content, output.size_bytes)
            record = _json(line.model_copy(update={"missing": gone}))
            at_s = (line.finished_at or line.created_at or page.read_at).timestamp()
            yield _member_head(f"{line.line:06d}.json", len(record), at_s)
            yield from _padded(iter([record]), len(record))
            count += 1
    end = _json(BulkEnd(items=count))
    yield _member_head("end.json", len(end), 0)
    yield from _padded(iter([end]), len(end))
    yield tarfile.NUL * tarfile.BLOCKSIZE * 2


def _member_head(name: str, size_bytes: int, at_s: float) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size_bytes, int(at_s), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padded(content: Iterator[bytes], size_bytes: int) -> Iterator[bytes]:
    """The content of a member, up to its next block.

    Raises:
        StorageError: it is not as long as its head has promised, so that nothing behind it could be read.
    """
    seen = 0
    for chunk in content:
        seen += len(chunk)
        yield chunk
    if seen != size_bytes:
        raise StorageError("A stored file is not as long as its row says.")
    yield tarfile.NUL * (-size_bytes % tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class _Page:
    lines: list[BulkManifestLine]
    blob_keys: dict[UUID, str]
    read_at: datetime


def _pages(bulk_id: UUID, after: int, caller: Caller) -> Iterator[_Page]:
    """All items behind that line. No session is open while a page is sent."""
    behind: int | None = after
    while behind is not None:
        with session_scope() as session:
            bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id)
            rows, behind = bulks.items(session, bulk, after=behind, limit=LINES_AT_A_TIME)
            found = [job for _, job, _ in rows if job is not None]
            seen = {view.id: view for view in views.job_list(session, found)}
            keys = {each.id: each.blob_key for made in outputs.of_jobs(session, list(seen)).values() for each in made}
            lines = [_line(item, job, state, seen.get(job.id) if job else None) for item, job, state in rows]
        yield _Page(lines, keys, datetime.now(UTC))


def _line(item: BulkItem, job: Job | None, state: ItemState, view: JobView | None) -> BulkManifestLine:
    return BulkManifestLine(
        line=item.line,
        custom_id=item.custom_id,
        kind=JobKind(item.kind),
        model=item.model,
        prompt=item.parameters["prompt"],
        metadata=item.item_metadata,
        state=state,
        job_id=verbs.job_of(item, job, state),
        retry_of=item.retry_of,
        attempt=view.attempt if view else 0,
        parameters=item.parameters,
        resolution=view.resolution if view else None,
        safety=view.safety if view else None,
        error=view.error if view else None,
        outputs=view.outputs if view else [],
        timings=view.timings if view else {},
        created_at=view.created_at if view else None,
        started_at=view.started_at if view else None,
        finished_at=view.finished_at if view else None,
    )


def _json(line: BaseModel) -> bytes:
    return orjson.dumps(line.model_dump(mode="json"), option=orjson.OPT_APPEND_NEWLINE)


def _until_fault(parts: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from parts
    except BaseAppException as error:
        logger.warning("bulk_download_cut", extra={"cause": error.code})
