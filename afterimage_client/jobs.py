"""Submit, follow, cancel, try again."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

import httpx
from httpx_sse import EventSource

from afterimage_client.connection import Connection, parsed
from afterimage_client.errors import TooManyStreamsError, WaitTimeoutError
from shared.contracts.generation import DryRunView, GenerateRequest, RagGenerateRequest
from shared.contracts.jobs import EventType, EventView, JobKind, JobState, JobView, Preview, Progress

LONG_POLL_S = 10.0
"""One wait, shorter than any that the service allows by default."""
STREAM_SILENCE_S = 45.0
"""A stream says something every 15 s; one that is silent for this long is dead."""
RECONNECT_S = 1.0
EVENT_TYPES = frozenset(event.value for event in EventType)
LIVE: Mapping[str, type[Progress] | type[Preview]] = {"progress": Progress, "preview": Preview}


@dataclass(frozen=True)
class Update:
    """News of a job.

    progress: how far its present attempt is, when that is what is new.
    preview: one of its images while it is drawn, if the request asked for `preview_every`.
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
        """Queue images from a prompt alone, or with a `RagGenerateRequest` from what the corpus remembers of it.

        A submit that got no answer is sent again with the same key, so there is one job however often it was sent.

        idempotency_key: your own, to be safe across restarts of your program too; it is remembered for 24 hours.

        Raises:
            InvalidRequestError: the request makes no sense, or the model cannot do it.
            IdempotencyKeyReusedError: the key came with another request.
            QueueFullError: still, after all tries.
        """
        if request.dry_run:
            raise ValueError("a dry run makes no job: see dry_run()")
        return parsed(JobView, self._post(request, idempotency_key or uuid4().hex))

    def dry_run(self, request: GenerateRequest) -> DryRunView:
        """What the request would run, with every default resolved; nothing is queued."""
        return parsed(DryRunView, self._post(request.model_copy(update={"dry_run": True}), None))

    def get(self, job: UUID | JobView) -> JobView:
        """The job as it is now."""
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
        """Your jobs, newest first."""
        query = {
            "state": state,
            "kind": kind,
            "created_after": created_after and created_after.isoformat(),
            "created_before": created_before and created_before.isoformat(),
            "limit": page_size,
        }
        return self._connection.pages(JobView, "/jobs", query)

    def wait(
        self,
        job: UUID | JobView,
        *,
        timeout_s: float | None = None,
        on_update: Callable[[Update], object] | None = None,
    ) -> JobView:
        """The job once it has ended, however it ended: look at its `state`.

        on_update: called with everything that is heard meanwhile.

        Raises:
            WaitTimeoutError: it has not ended in time; it goes on.
        """
        for update in self.follow(job, timeout_s=timeout_s):
            if on_update is not None:
                on_update(update)
        return self.get(job)

    def follow(self, job: UUID | JobView, *, timeout_s: float | None = None) -> Iterator[Update]:
        """Everything that happens to a job until it has ended.

        By the event stream, resumed after what was heard last when it breaks; by long-polls, which tell no steps, when
        the service has no stream to give.

        Raises:
            WaitTimeoutError: it has not ended in time; it goes on.
        """
        ends = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        heard = Update(JobState.QUEUED, seq=0)
        try:
            # A stream is left in time for polls to end the wait: they can be told how long to take.
            for heard in self._updates_from_stream(_id(job), until=ends - STREAM_SILENCE_S):
                yield heard
        except TooManyStreamsError:
            pass
        if not heard.state.is_final:
            yield from self._updates_from_polls(_id(job), after=heard.seq, until=ends)

    def events(self, job: UUID | JobView, *, after: int = 0) -> Iterator[EventView | Progress | Preview]:
        """The job's log of events later than number `after`, live until it has ended; in between steps and previews.

        Raises:
            TooManyStreamsError: the process asked holds as many streams as it may.
        """
        for event in self._stream(_id(job), after=after):
            if event is not None:
                yield event

    def cancel(self, job: UUID | JobView) -> JobView:
        """Cancel a job; one that is canceled already stays so.

        Raises:
            ConflictError: it has ended otherwise.
        """
        return self._connection.post(JobView, f"/jobs/{_id(job)}/cancel")

    def retry(self, job: UUID | JobView) -> JobView:
        """A new job that does the same as one that ended without success.

        Without an answer this is not sent again by itself: there might be two jobs then.

        Raises:
            ConflictError: it has not ended, or has succeeded.
        """
        return self._connection.post(JobView, f"/jobs/{_id(job)}/retry", repeatable=False)

    def delete(self, job: UUID | JobView) -> None:
        """Delete an ended job with its outputs."""
        self._connection.delete(f"/jobs/{_id(job)}")

    def _post(self, request: GenerateRequest, key: str | None) -> httpx.Response:
        path = "/rag/generate" if isinstance(request, RagGenerateRequest) else "/generate"
        body = request.model_dump_json(exclude_unset=True).encode()
        headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
        return self._connection.send("POST", path, content=body, headers=headers)

    def _updates_from_stream(self, job_id: UUID, *, until: float) -> Iterator[Update]:
        """Until the job has ended or the clock stands at `until`."""
        heard = Update(JobState.QUEUED, seq=0)
        if time.monotonic() >= until:
            return
        for event in self._stream(job_id, after=0):
            if isinstance(event, EventView):
                heard = Update(_state_after(event.type, heard.state), event.seq)
                yield heard
            elif isinstance(event, Progress):
                yield Update(heard.state, heard.seq, progress=event)
            elif isinstance(event, Preview):
                yield Update(heard.state, heard.seq, preview=event)
            if time.monotonic() >= until:
                return

    def _stream(self, job_id: UUID, *, after: int) -> Iterator[EventView | Progress | Preview | None]:
        """Events, and None for a sign of life; a broken stream is resumed after the last event heard."""
        while True:
            response = self._connection.again_while_passing(lambda: self._open_stream(job_id, after))  # noqa: B023
            if response.status_code == httpx.codes.NO_CONTENT:
                return  # it had ended, and everything of it is known
            with closing(response), suppress(httpx.TransportError):
                for message in EventSource(response).iter_sse():
                    if message.event in EVENT_TYPES:
                        event = EventView.model_validate_json(message.data, extra="ignore")
                        after = event.seq
                        yield event
                        if event.type.ends_job:
                            return
                    elif message.event in LIVE:
                        yield LIVE[message.event].model_validate_json(message.data, extra="ignore")
                    else:
                        yield None  # a heartbeat, or what a newer service tells
            self._connection.pause(RECONNECT_S)
            yield None

    def _open_stream(self, job_id: UUID, after: int) -> httpx.Response:
        return self._connection.open(
            "GET",
            f"/jobs/{job_id}/events",
            headers={"Accept": "text/event-stream", "Last-Event-ID": str(after)},
            timeout=self._connection.timeout(read_s=STREAM_SILENCE_S),
        )

    def _updates_from_polls(self, job_id: UUID, *, after: int, until: float) -> Iterator[Update]:
        while True:
            wait_s = max(0, min(LONG_POLL_S, until - time.monotonic()))
            response = self._connection.send(
                "GET",
                f"/jobs/{job_id}",
                params={"after": after},
                headers={"Prefer": f"wait={round(wait_s)}"},
                timeout=self._connection.timeout(read_s=wait_s + STREAM_SILENCE_S),
            )
            view = parsed(JobView, response)
            if view.seq > after or view.state.is_final:
                after = view.seq
                yield Update(view.state, view.seq, view.progress)
            if view.state.is_final:
                return
            if time.monotonic() >= until:
                raise WaitTimeoutError(f"job {job_id} is {view.state} still")
            if "Preference-Applied" not in response.headers:  # answered at once: no place to wait was left
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


def _id(job: UUID | JobView) -> UUID:
    return job.id if isinstance(job, JobView) else job
