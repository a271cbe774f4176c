"""Waiting for jobs: long-polls and event streams, bounded in number and time, without a database session in hand."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from uuid import UUID

import orjson
from flask import Response

from api_service.http import responses
from api_service.http.auth import Caller
from api_service.http.concurrency import waiters, work
from api_service.services import views
from shared.contracts.jobs import EventView, JobState, JobView
from shared.db import jobs
from shared.db.session import session_scope
from shared.errors import DatabaseConnectionError, ResourceNotFoundError, TooManyStreamsError
from shared.messaging.job_updates import close_subscriber, subscriber
from shared.settings import get_settings

HEARTBEAT_S = 15.0
RECONNECT_MS = 2000


def job(job_id: UUID, *, caller: Caller) -> JobView:
    """The job as it is now.

    Raises:
        ResourceNotFoundError, DatabaseConnectionError
    """
    with session_scope() as session:
        row = jobs.get(session, job_id, owner_id=caller.owner_id)
        return views.job(session, row, progress=subscriber().latest(job_id))


def wait_for_job(
    job_id: UUID, *, caller: Caller, timeout_s: float, until: Callable[[JobView], bool]
) -> tuple[JobView, bool]:
    """The job as soon as `until` holds of it, or as it is after `timeout_s`; and whether it was waited for.

    It is not when this process already holds as many waiters as it may, in all or of this owner.

    Raises:
        ResourceNotFoundError, DatabaseConnectionError
    """
    deadline = time.monotonic() + min(timeout_s, get_settings().api.max_wait_s)
    places = waiters()
    if not places.take(caller.owner_id):
        return job(job_id, caller=caller), False
    try:
        with subscriber().watch(job_id) as watch:
            view = job(job_id, caller=caller)
            while not until(view) and not subscriber().closing and (left_s := deadline - time.monotonic()) > 0:
                with work().left():
                    changed = watch.wait(left_s).changed
                if changed:
                    view = job(job_id, caller=caller)
            return view, True
    finally:
        places.give_back(caller.owner_id)


def end_with_process() -> None:
    """From the first signal on, let every wait and stream come to an end, so that a stop is not held up by them.

    For the main thread of a server process. Granian's own signal handler stays; this one is told beside it.
    """
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno())

    def wait_for_signal(told: socket.socket, _tell: socket.socket) -> None:
        # Both ends live as long as this thread; one that is collected would close and end the wait at once.
        told.recv(1)
        close_subscriber()

    threading.Thread(target=wait_for_signal, args=(told, tell), name="end-with-process", daemon=True).start()


def event_stream(job_id: UUID, *, caller: Caller, after: int) -> Response:
    """The job's events later than `after` as server-sent events, live until the job has ended.

    Events carry their number as id, so that a client resumes where it was; progress and previews carry none. 204
    tells an EventSource that nothing will come any more.

    Raises:
        ResourceNotFoundError, DatabaseConnectionError
        TooManyStreamsError: this process already holds as many waiters as it may, in all or of this owner.
    """
    now = job(job_id, caller=caller)
    if now.state.is_final and now.seq <= after:
        return responses.no_content()
    places = waiters()
    if not places.take(caller.owner_id):
        raise TooManyStreamsError
    response = Response(_stream(job_id, after), content_type="text/event-stream")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"
    # Not in the generator: one that is closed before its first step runs no `finally`.
    response.call_on_close(partial(places.give_back, caller.owner_id))
    return response


def _stream(job_id: UUID, after: int) -> Iterator[bytes]:
    ends = time.monotonic() + get_settings().api.max_stream_s
    yield b"retry: %d\n\n" % RECONNECT_MS
    with subscriber().watch(job_id) as watch:
        changed, beat = True, time.monotonic() + HEARTBEAT_S
        while time.monotonic() < ends and not subscriber().closing:
            if changed:
                try:
                    new, over = _events(job_id, after)
                except (DatabaseConnectionError, ResourceNotFoundError):
                    return  # the client comes back with Last-Event-ID, and hears what is wrong
                for event in new:
                    yield _message(event.type, event.model_dump(mode="json"), event_id=event.seq)
                    after = event.seq
                if over:
                    return
            left_s = min(beat, ends) - time.monotonic()
            changed, progress, previews = watch.wait(max(left_s, 0))
            for preview in previews:
                yield _message("preview", preview.model_dump())
            if progress is not None:
                yield _message("progress", progress.model_dump())
            if time.monotonic() >= beat:
                yield b": still here\n\n"
                beat = time.monotonic() + HEARTBEAT_S


def _events(job_id: UUID, after: int) -> tuple[list[EventView], bool]:
    """New events, and whether the last of them ended the job."""
    with session_scope() as session:
        # Read before the events: a job that ends in between is looked at once more.
        state = jobs.state_of(session, job_id)
        new = [views.event(row) for row in jobs.events(session, job_id, after=after)]
    if state is None:
        raise ResourceNotFoundError
    return new, JobState(state).is_final


def _message(name: str, data: object, *, event_id: int | None = None) -> bytes:
    number = b"" if event_id is None else b"id: %d\n" % event_id
    return b"%sevent: %s\ndata: %s\n\n" % (number, name.encode(), orjson.dumps(data))
