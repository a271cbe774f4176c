"""Studio's page of the queue, and the event stream that keeps it live."""

import time
from collections.abc import Iterator
from uuid import UUID

from flask import Response, g, request

from api_service import services
from api_service.http.auth import Caller, statistics_owner
from api_service.http.event_streams import HEARTBEAT, HEARTBEAT_S, sse_message, stream_response
from api_service.services.queue import QueueNumbers
from api_service.studio.pages import page_blueprint, read_form, render_page
from shared.cache import cache_result
from shared.contracts.jobs import JobQuery, JobState
from shared.contracts.service import StatsView
from shared.errors import BaseAppException
from shared.messaging.job_updates import LOOK_AGAIN_S, subscriber
from shared.settings import get_settings

studio_queue = page_blueprint("studio_queue")

STATS_TTL_S = 2
EVERY_S = 1.0
"""Seconds between two looks for news while a page shows the queue."""


@studio_queue.get("/queue")
def queue() -> Response:
    query = read_form(JobQuery, request.args, ("state", "cursor"))
    owner_id = statistics_owner(g.caller)
    places = services.status.places_before_model(owner_id=owner_id)
    jobs = services.jobs.list_page(query, caller=g.caller, with_positions=True)
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
        numbers=_numbers(owner_id),
        models=services.status.models().models,
        counts_everything=owner_id is None,
    )


@cache_result(key_prefix="studio", ttl=STATS_TTL_S)
def _stats(owner_id: UUID | None) -> StatsView:
    """Return cached statistics, because counting reads whole tables. owner_id: as in `services.status.stats`."""
    return services.status.stats(owner_id=owner_id)


@cache_result(key_prefix="studio", ttl=STATS_TTL_S)
def _numbers(owner_id: UUID | None) -> QueueNumbers:
    return services.queue.count(owner_id=owner_id)


@studio_queue.get("/queue/events")
def events() -> Response:
    """Stream changes of the queue's first page as server-sent events.

    `changed`: a job came, moved or ended, so the page is worth reading again. `progress`: the steps of running jobs.

    Raises:
        DatabaseConnectionError: the database does not answer.
        TooManyStreamsError: this process has reached its limit of waiters, in total or for this owner.
    """
    query, caller = read_form(JobQuery, request.args, ("state",)), g.caller
    services.queue.look(query, caller=caller)  # an error here is the response; a stream has no status to give
    return stream_response(_changes(query, caller), owner_id=caller.owner_id)


def _changes(query: JobQuery, caller: Caller) -> Iterator[bytes]:
    ends_at, heartbeat_at = time.monotonic() + get_settings().api.max_stream_s, 0.0
    seen, seen_progress, look_at = None, None, 0.0
    while time.monotonic() < ends_at and not subscriber().closing:
        if seen is None or seen.changes != subscriber().changes or time.monotonic() >= look_at:
            try:
                look = services.queue.look(query, caller=caller)
            except BaseAppException:
                return  # the browser connects again, and gets the error as a response
            if seen is not None and look.digest != seen.digest:
                yield sse_message("changed", {})
            seen, look_at = look, time.monotonic() + LOOK_AGAIN_S[subscriber().connected]
        latest = {each: subscriber().latest_progress(each) for each in seen.drawing}
        progress = {str(each): shown.model_dump() for each, shown in latest.items() if shown is not None}
        if progress and progress != seen_progress:
            yield sse_message("progress", progress)
        seen_progress = progress
        if time.monotonic() >= heartbeat_at:
            yield HEARTBEAT
            heartbeat_at = time.monotonic() + HEARTBEAT_S
        time.sleep(EVERY_S)
