"""Jobs: submit, follow, cancel, retry."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

import httpx
from httpx_sse import EventSource

from afterimage_client.connection import Connection, Id, id_of, parse_response
from afterimage_client.errors import InvalidInputError, TooManyStreamsError, WaitTimeoutError
from shared.contracts.generation import DryRunView, GenerateRequest, RagGenerateRequest
from shared.contracts.jobs import (
    EventType,
    EventView,
    JobKind,
    JobState,
    JobView,
    Preview,
    Progress,
    ReferenceImageView,
)

LONG_POLL_S = 10.0
"""Length of one long-poll; shorter than the default limit of the service."""
STREAM_READ_TIMEOUT_S = 45.0
"""A stream sends a heartbeat every 15 s, so a stream without data for this long is broken."""
RECONNECT_S = 1.0
EVENT_TYPES = frozenset(event.value for event in EventType)
LIVE_MODELS: Mapping[str, type[Progress] | type[Preview]] = {"progress": Progress, "preview": Preview}


@dataclass(frozen=True)
class Update:
    """A change of a job.

    Attributes:
        seq: number of the job's last event.
        progress: progress of the current attempt; None for other updates.
        preview: one of its images during generation, if the request set `preview_every`; else None.
    """

    state: JobState
    seq: int
    progress: Progress | None = None
    preview: Preview | None = None


class Jobs:
    """`Afterimage.jobs`"""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def submit(self, request: GenerateRequest, *, idempotency_key: str | None = None) -> JobView:
        """Queue a generation from a prompt alone, or with references from the corpus (`RagGenerateRequest`).

        A request without an answer is sent again with the same idempotency key, so there is one job.

        idempotency_key: your own, so that retries after a restart of your program return the same job. The service
            keeps a key for 24 hours.

        Raises:
            InvalidInputError: `request.dry_run` is set.
            InvalidRequestError: the request is invalid, or the model does not support it.
            IdempotencyKeyReusedError: the key was used with another request.
            QueueFullError: the queue was full in every try.
        """
        if request.dry_run:
            raise InvalidInputError("a dry run creates no job: call dry_run()")
        return parse_response(JobView, self._post(request, idempotency_key or uuid4().hex))

    def dry_run(self, request: GenerateRequest) -> DryRunView:
        """Return the parameters that the request would run with, every default resolved; nothing is queued."""
        return parse_response(DryRunView, self._post(request.model_copy(update={"dry_run": True}), None))

    def get(self, job: Id | JobView) -> JobView:
        """Return the current state of a job."""
        return self._connection.get(JobView, f"/jobs/{_id(job)}")

    def list(
        self,
        *,
        state: JobState | None = None,
        kind: JobKind | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        page_size: int = 100,
    ) -> Iterator[JobView]:
        """Yield your jobs, newest first."""
        query = {
            "state": state,
            "kind": kind,
            "created_after": created_after and created_after.isoformat(),
            "created_before": created_before and created_before.isoformat(),
            "limit": page_size,
        }
        return self._connection.iterate_pages(JobView, "/jobs", query)

    def wait(
        self,
        job: Id | JobView,
        *,
        timeout_s: float | None = None,
        on_update: Callable[[Update], object] | None = None,
    ) -> JobView:
        """Wait until the job has ended, and return it. It may have failed: check its `state`.

        on_update: called with every update.

        Raises:
            WaitTimeoutError: the job has not ended within `timeout_s`; it still runs.
        """
        for update in self.follow(job, timeout_s=timeout_s):
            if on_update is not None:
                on_update(update)
        return self.get(job)

    def follow(self, job: Id | JobView, *, timeout_s: float | None = None) -> Iterator[Update]:
        """Yield the updates of a job until it has ended.

        They come from the event stream, which is resumed after the last update when it breaks. If the service has no
        free stream, they come from long-polls, without steps.

        Raises:
            WaitTimeoutError: the job has not ended within `timeout_s`; it still runs.
        """
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        last = Update(JobState.QUEUED, seq=0)
        try:
            # Polls finish the wait, because a poll has a time limit and a stream has not.
            for last in self._updates_from_stream(_id(job), until=deadline - STREAM_READ_TIMEOUT_S):
                yield last
        except TooManyStreamsError:
            pass
        if not last.state.is_final:
            yield from self._updates_from_polls(_id(job), after=last.seq, until=deadline)

    def events(self, job: Id | JobView, *, after: int = 0) -> Iterator[EventView | Progress | Preview]:
        """Yield the job's events after number `after`, live until it has ended, and its steps and previews.

        Raises:
            TooManyStreamsError: the API process has its maximum number of open streams.
        """
        for event in self._stream(_id(job), after=after):
            if event is not None:
                yield event

    def cancel(self, job: Id | JobView) -> JobView:
        """Cancel a job; for a canceled job this changes nothing.

        Raises:
            ConflictError: the job has ended in another state.
        """
        return self._connection.post(JobView, f"/jobs/{_id(job)}/cancel")

    def retry(self, job: Id | JobView) -> JobView:
        """Create a new job from one that ended without success.

        A request without an answer is not sent again, because that could create two jobs.

        Raises:
            ConflictError: the job has not ended, or has succeeded.
        """
        return self._connection.post(JobView, f"/jobs/{_id(job)}/retry", idempotent=False)

    def delete(self, job: Id | JobView) -> None:
        """Delete an ended job with its outputs."""
        self._connection.delete(f"/jobs/{_id(job)}")

    def reference_content(self, picture: ReferenceImageView) -> bytes:
        """Return the stored file of a picture that the request of a job brought.

        Raises:
            NotFoundError: the job was deleted.
        """
        return self._connection.send("GET", f"/reference-images/{picture.id}/content").content

    def _post(self, request: GenerateRequest, key: str | None) -> httpx.Response:
        path = "/rag/generate" if isinstance(request, RagGenerateRequest) else "/generate"
        body = request.model_dump_json(exclude_unset=True).encode()
        headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
        pictures = len(request.reference_images) if isinstance(request, RagGenerateRequest) else 0
        timeout = self._connection.decode_timeout(files=pictures)
        return self._connection.send("POST", path, content=body, headers=headers, timeout=timeout)

    def _updates_from_stream(self, job_id: UUID, *, until: float) -> Iterator[Update]:
        """Yield updates until the job has ended or `time.monotonic()` reaches `until`."""
        last = Update(JobState.QUEUED, seq=0)
        if time.monotonic() >= until:
            return
        for event in self._stream(job_id, after=0):
            if isinstance(event, EventView):
                last = Update(_state_after(event.type, last.state), event.seq)
                yield last
            elif isinstance(event, Progress):
                yield Update(last.state, last.seq, progress=event)
            elif isinstance(event, Preview):
                yield Update(last.state, last.seq, preview=event)
            if time.monotonic() >= until:
                return

    def _stream(self, job_id: UUID, *, after: int) -> Iterator[EventView | Progress | Preview | None]:
        """Yield events, and None for a heartbeat; resume a broken stream after the last event."""
        while True:
            response = self._connection.retry(lambda: self._open_stream(job_id, after))  # noqa: B023
            if response.status_code == httpx.codes.NO_CONTENT:
                return  # the job has ended, and all of its events were received
            with closing(response), suppress(httpx.TransportError):
                for message in EventSource(response).iter_sse():
                    if message.event in EVENT_TYPES:
                        event = EventView.model_validate_json(message.data, extra="ignore")
                        after = event.seq
                        yield event
                        if event.type.ends_job:
                            return
                    elif message.event in LIVE_MODELS:
                        yield LIVE_MODELS[message.event].model_validate_json(message.data, extra="ignore")
                    else:
                        yield None  # a heartbeat, or an event type of a newer service
            self._connection.pause(RECONNECT_S)
            yield None

    def _open_stream(self, job_id: UUID, after: int) -> httpx.Response:
        return self._connection.open(
            "GET",
            f"/jobs/{job_id}/events",
            headers={"Accept": "text/event-stream", "Last-Event-ID": str(after)},
            timeout=self._connection.timeout(read_s=STREAM_READ_TIMEOUT_S),
        )

    def _updates_from_polls(self, job_id: UUID, *, after: int, until: float) -> Iterator[Update]:
        while True:
            wait_s = max(0, min(LONG_POLL_S, until - time.monotonic()))
            response = self._connection.send(
                "GET",
                f"/jobs/{job_id}",
                params={"after": after},
                headers={"Prefer": f"wait={round(wait_s)}"},
                timeout=self._connection.timeout(read_s=wait_s + STREAM_READ_TIMEOUT_S),
            )
            view = parse_response(JobView, response)
            if view.seq > after or view.state.is_final:
                after = view.seq
                yield Update(view.state, view.seq, view.progress)
            if view.state.is_final:
                return
            if time.monotonic() >= until:
                raise WaitTimeoutError(f"job {job_id} is still {view.state}")
            if (
                "Preference-Applied" not in response.headers
            ):  # answered at once: the service has its maximum of waiting requests
                self._connection.pause(min(1.0, max(0, until - time.monotonic())))


def _state_after(event: EventType, before: JobState) -> JobState:
    match event:
        case EventType.QUEUED | EventType.REQUEUED:
            return JobState.QUEUED
        case EventType.STARTED | EventType.RESOLVED:
            return JobState.PROCESSING
        case _ if event.ends_job:
            return JobState(event.value)
        case _:
            return before


def _id(job: Id | JobView) -> UUID:
    return id_of(job, JobView)
