"""Studio's page of the queue, and the event stream that keeps it live."""

import hashlib
import time
from collections.abc import Iterator
from functools import partial
from uuid import UUID

import orjson
from flask import Response, g, request

from api_service import services
from api_service.http.auth import Caller, statistics_owner
from api_service.http.concurrency import waiter_slots
from api_service.studio.pages import page_blueprint, read_form, render_page
from shared.cache import cache_result
from shared.contracts.jobs import JobQuery, JobState
from shared.contracts.service import StatsView
from shared.errors import BaseAppException, TooManyStreamsError
from shared.messaging.job_updates import subscriber
from shared.settings import get_settings

studio_queue = page_blueprint("studio_queue")

STATS_TTL_S = 2
EVERY_S = 1.0
"""Seconds between two looks at the queue while a page shows it."""
HEARTBEAT_S = 15.0


@studio_queue.get("/queue")
def queue() -> Response:
    query = read_form(JobQuery, request.args, ("state", "cursor"))
    owner_id = statistics_owner(g.caller)
    places = services.status.places_before_model(owner_id=owner_id)
    jobs = services.jobs.list_page(query, caller=g.caller)
    return render_page(
        "queue",
        active="queue",
        jobs=jobs,
        places=places,
        progress={
            each.id: subscriber().latest_progress(each.id)
            for each in jobs.items
            if each.state is JobState.PROCESSING and each.id not in places
        },
        query=query,
        stats=_stats(owner_id),
        models=services.status.models().models,
        counts_everything=owner_id is None,
    )


@cache_result(key_prefix="studio", ttl=STATS_TTL_S)
def _stats(owner_id: UUID | None) -> StatsView:
    """Return cached statistics, because counting reads whole tables. owner_id: as in `services.status.stats`."""
    return services.status.stats(owner_id=owner_id)


@studio_queue.get("/queue/events")
def events() -> Response:
    """Stream changes of the queue's first page as server-sent events.

    `changed`: a job came, moved or ended, so the page is worth reading again. `progress`: the steps of running jobs.

    Raises:
        TooManyStreamsError: this process has reached its limit of waiters, in total or for this owner.
    """
    query, caller = read_form(JobQuery, request.args, ("state",)), g.caller
    slots = waiter_slots()
    if not slots.take(caller.owner_id):
        raise TooManyStreamsError
    response = Response(_changes(query, caller), content_type="text/event-stream")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"
    # Not in the generator: if it is closed before its first step, its `finally` does not run.
    response.call_on_close(partial(slots.release, caller.owner_id))
    return response


def _changes(query: JobQuery, caller: Caller) -> Iterator[bytes]:
    ends_at, heartbeat_at = time.monotonic() + get_settings().api.max_stream_s, 0.0
    seen, seen_progress = None, None
    while time.monotonic() < ends_at and not subscriber().closing:
        try:
            jobs = services.jobs.list_page(query, caller=caller).items
            places = services.status.places_before_model()
        except BaseAppException:
            return  # the browser connects again, and gets the error as a response
        state = hashlib.sha256(orjson.dumps([(each.id, each.state, each.seq, places.get(each.id)) for each in jobs]))
        if seen not in (None, state.digest()):
            yield b"event: changed\ndata: {}\n\n"
        seen = state.digest()
        running = [each.id for each in jobs if each.state is JobState.PROCESSING and each.id not in places]
        latest = {each: subscriber().latest_progress(each) for each in running}
        progress = {str(each): shown.model_dump() for each, shown in latest.items() if shown is not None}
        if progress and progress != seen_progress:
            yield b"event: progress\ndata: %s\n\n" % orjson.dumps(progress)
        seen_progress = progress
        if time.monotonic() >= heartbeat_at:
            yield b": still here\n\n"
            heartbeat_at = time.monotonic() + HEARTBEAT_S
        time.sleep(EVERY_S)
