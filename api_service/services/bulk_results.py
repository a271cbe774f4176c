"""Downloads of a bulk's results as streams. Their memory use does not grow with the number of items."""

import logging
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import orjson
from pydantic import BaseModel

from api_service.http.auth import Caller
from api_service.services import views
from api_service.services.bulks import item_job_id
from shared.contracts.bulks import BulkEnd, BulkManifestLine, ItemState
from shared.contracts.jobs import JobKind, JobView
from shared.db import bulks, outputs
from shared.db.session import session_scope
from shared.db.tables import BulkItem, Job
from shared.errors import BaseAppException, ResourceNotFoundError, StorageError
from shared.storage import get_blobs

logger = logging.getLogger(__name__)

LINES_PER_PAGE = 100


def manifest(bulk_id: UUID, *, after: int, caller: Caller) -> Iterator[bytes]:
    """Yield one line of JSON for each item after line `after`, and a last line that marks the end.

    The server ends a broken stream like a complete one. Only the last line proves that the download is complete.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id. Raised at the call, not in the iteration.
    """
    with session_scope() as session:
        bulks.get(session, bulk_id, owner_id=caller.owner_id)
    return _stop_at_error(_manifest(bulk_id, after, caller))


def archive(bulk_id: UUID, *, after: int, caller: Caller) -> Iterator[bytes]:
    """Yield a tar archive with all images made so far. Each item's images are followed by its line of the manifest.

    The last member marks the end; an archive without it was cut.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id. Raised at the call, not in the iteration.
    """
    with session_scope() as session:
        bulks.get(session, bulk_id, owner_id=caller.owner_id)
    return _stop_at_error(_archive(bulk_id, after, caller))


def _manifest(bulk_id: UUID, after: int, caller: Caller) -> Iterator[bytes]:
    count = 0
    for page in _pages(bulk_id, after, caller):
        count += len(page.lines)
        yield b"".join(_json_line(line) for line in page.lines)
    yield _json_line(BulkEnd(items=count))


def _archive(bulk_id: UUID, after: int, caller: Caller) -> Iterator[bytes]:
    count = 0
    for page in _pages(bulk_id, after, caller):
        for line in page.lines:
            missing: list[int] = []
            for output in line.outputs:
                if output.withdrawn is not None:
                    continue
                name = f"{line.line:06d}-{output.index}.{output.format}"
                at_s = output.created_at.timestamp()
                try:
                    content = get_blobs().stream(page.blob_keys[output.id])
                except ResourceNotFoundError:
                    missing.append(output.index)
                else:
                    yield _tar_header(name, output.size_bytes, at_s)
                    yield from _padded_content(content, output.size_bytes)
            record = _json_line(line.model_copy(update={"missing": missing}))
            at_s = (line.finished_at or line.created_at or page.read_at).timestamp()
            yield _tar_header(f"{line.line:06d}.json", len(record), at_s)
            yield from _padded_content(iter([record]), len(record))
            count += 1
    end = _json_line(BulkEnd(items=count))
    yield _tar_header("end.json", len(end), 0)
    yield from _padded_content(iter([end]), len(end))
    yield tarfile.NUL * tarfile.BLOCKSIZE * 2


def _tar_header(name: str, size_bytes: int, at_s: float) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size_bytes, int(at_s), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padded_content(content: Iterator[bytes], size_bytes: int) -> Iterator[bytes]:
    """Yield the content of a member, padded to a full tar block.

    Raises:
        StorageError: the content does not have `size_bytes`, as its tar header says. The rest would be unreadable.
    """
    sent_bytes = 0
    for chunk in content:
        sent_bytes += len(chunk)
        yield chunk
    if sent_bytes != size_bytes:
        raise StorageError("The size of a stored file differs from its database row.")
    yield tarfile.NUL * (-size_bytes % tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class _Page:
    lines: list[BulkManifestLine]
    blob_keys: dict[UUID, str]
    read_at: datetime


def _pages(bulk_id: UUID, after: int, caller: Caller) -> Iterator[_Page]:
    """Yield all items after line `after`. No database session is open while a page is sent."""
    last_line: int | None = after
    while last_line is not None:
        with session_scope() as session:
            bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id)
            rows, last_line = bulks.list_items(session, bulk, after=last_line, limit=LINES_PER_PAGE)
            jobs = [job for _, job, _ in rows if job is not None]
            views_by_id = {view.id: view for view in views.jobs(session, jobs)}
            outputs_by_job = outputs.list_by_job(session, list(views_by_id))
            keys = {each.id: each.blob_key for of_job in outputs_by_job.values() for each in of_job}
            lines = [
                _manifest_line(item, job, state, views_by_id.get(job.id) if job else None) for item, job, state in rows
            ]
        yield _Page(lines, keys, datetime.now(UTC))


def _manifest_line(item: BulkItem, job: Job | None, state: ItemState, view: JobView | None) -> BulkManifestLine:
    return BulkManifestLine(
        line=item.line,
        custom_id=item.custom_id,
        kind=JobKind(item.kind),
        model=item.model,
        prompt=item.parameters["prompt"],
        metadata=item.item_metadata,
        state=state,
        job_id=item_job_id(item, job, state),
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


def _json_line(line: BaseModel) -> bytes:
    return orjson.dumps(line.model_dump(mode="json"), option=orjson.OPT_APPEND_NEWLINE)


def _stop_at_error(parts: Iterator[bytes]) -> Iterator[bytes]:
    """End the stream at an error, because the status was already sent. Its end marker is then missing."""
    try:
        yield from parts
    except BaseAppException as error:
        logger.warning("bulk_download_cut", extra={"cause": error.code})
