"""Long-polls and event streams of jobs. Their number and time are limited; a wait uses no database session."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from uuid import UUID

from flask import Response

from api_service.http import responses
from api_service.http.auth import Caller
from api_service.http.concurrency import active_requests, waiter_slots
from api_service.http.event_streams import HEARTBEAT, HEARTBEAT_S, sse_message, stream_response
from api_service.services import views
from api_service.services.job_waits import JobWait, job_reader
from api_service.services.jobs import get as get_job
from shared.contracts.jobs import EventView, JobState, JobView
from shared.db import jobs
from shared.db.session import session_scope
from shared.errors import DatabaseConnectionError, ResourceNotFoundError
from shared.messaging.job_updates import close_subscriber, subscriber
from shared.settings import get_settings

RECONNECT_MS = 2000


def wait_for_job(
    job_id: UUID, *, caller: Caller, timeout_s: float, after: int | None = None, known: JobView | None = None
) -> tuple[JobView, bool]:
    """Wait until the job has ended, at most `timeout_s`; return the job, and whether the service waited.

    It does not wait when this process has reached its limit of waiters, in total or for this owner.

    after: also return when the job has an event with a higher number. known: a view of the job that was true before.

    Raises:
        ResourceNotFoundError: the caller has no job with this id.
        DatabaseConnectionError: the database does not answer.
    """
    deadline = time.monotonic() + min(timeout_s, get_settings().api.max_wait_s)
    slots = waiter_slots()
    if not slots.take(caller.owner_id):
        return get_job(job_id, caller=caller), False
    try:
        wait = JobWait(job_id, after=after)
        with job_reader().waiting(wait):
            view = known or get_job(job_id, caller=caller)
            if wait.is_over(view.state, view.seq):
                return view, True
            with active_requests().released(), suppress(TimeoutError):
                if (ended := wait.result.result(max(deadline - time.monotonic(), 0))) is not None:
                    return ended, True
        return get_job(job_id, caller=caller), True
    finally:
        slots.release(caller.owner_id)


def close_streams_on_signal() -> None:
    """End all waits and streams at the first signal, so that they do not delay a shutdown.

    Call it in the main thread of a server process. Granian's own signal handler stays in place.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.fileno())

    def wait_for_signal(receiver: socket.socket, _sender: socket.socket) -> None:
        # The thread refers to both sockets: if one were garbage-collected, `recv` would return at once.
        receiver.recv(1)
        close_subscriber()

    threading.Thread(target=wait_for_signal, args=(receiver, sender), name="close-streams", daemon=True).start()


def event_stream(job_id: UUID, *, caller: Caller, after: int) -> Response:
    """Stream the job's events after number `after` as server-sent events, until the job has ended.

    Events have their number as id, so a client can resume. Progress and previews have no id. If the job has ended and
    no event is left, the response is 204, on which an EventSource stops reconnecting.

    Raises:
        ResourceNotFoundError: the caller has no job with this id.
        DatabaseConnectionError: the database does not answer.
        TooManyStreamsError: this process has reached its limit of waiters, in total or for this owner.
    """
    view = get_job(job_id, caller=caller)
    if view.state.is_final and view.seq <= after:
        return responses.no_content()
    return stream_response(_stream(job_id, after), owner_id=caller.owner_id)


def _stream(job_id: UUID, after: int) -> Iterator[bytes]:
    ends_at = time.monotonic() + get_settings().api.max_stream_s
    yield b"retry: %d\n\n" % RECONNECT_MS
    with subscriber().watch(job_id) as watch:
        changed, heartbeat_at = True, time.monotonic() + HEARTBEAT_S
        while time.monotonic() < ends_at and not subscriber().closing:
            if changed:
                try:
                    new_events, ended = _new_events(job_id, after)
                except (DatabaseConnectionError, ResourceNotFoundError):
                    return  # the client reconnects with Last-Event-ID, and gets the error as a response
                for event in new_events:
                    yield sse_message(event.type, event.model_dump(mode="json"), event_id=event.seq)
                    after = event.seq
                if ended:
                    return
            remaining_s = min(heartbeat_at, ends_at) - time.monotonic()
            changed, progress, previews = watch.wait(max(remaining_s, 0))
            for preview in previews:
                yield sse_message("preview", preview.model_dump())
            if progress is not None:
                yield sse_message("progress", progress.model_dump())
            if time.monotonic() >= heartbeat_at:
                yield HEARTBEAT
                heartbeat_at = time.monotonic() + HEARTBEAT_S


def _new_events(job_id: UUID, after: int) -> tuple[list[EventView], bool]:
    """Return the events after number `after`, and whether the job has ended with the last of them."""
    with session_scope() as session:
        # The state is read before the events: if the job ends in between, the caller reads once more.
        state = jobs.find_state(session, job_id)
        new = [views.event(row) for row in jobs.list_events(session, job_id, after=after)]
    if state is None:
        raise ResourceNotFoundError
    return new, JobState(state).is_final
