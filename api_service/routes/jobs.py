"""Routes of jobs: list, read, wait, stream events, cancel, retry and delete."""

from uuid import UUID

from flask import Response, g, request
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import problems, responses
from api_service.http.blueprint import ApiBlueprint
from api_service.http.urls import API
from api_service.routes.generation import idempotency_key, submit_response
from shared.contracts.common import Contract, Page
from shared.contracts.jobs import EventsQuery, JobQuery, JobView, JobWait

jobs = ApiBlueprint("jobs", __name__, url_prefix=f"{API}/jobs", abp_tags=[Tag(name="jobs", description="Follow jobs.")])


class JobPath(Contract):
    job_id: UUID


@jobs.get("", operation_id="listJobs", responses={200: Page[JobView]})
def list_jobs(query: JobQuery) -> Page[JobView]:
    """List the caller's jobs, newest first"""
    return services.jobs.list_page(query, caller=g.caller)


@jobs.get("/<job_id>", operation_id="getJob", responses={200: JobView})
def get_job(path: JobPath, query: JobWait) -> Response:
    """Get a job with its outputs

    With `wait` (or `Prefer: wait=N`) the service waits until the job has ended. With `after`, it also answers when the
    job has an event with a higher number. When the time is over, it answers with the job as it is.
    """
    preferred = responses.preferred_wait_s()
    wait_s = preferred if query.wait is None else query.wait
    if not wait_s:
        return responses.job(services.jobs.get(path.job_id, caller=g.caller))
    view, waited = services.job_stream.wait_for_job(path.job_id, caller=g.caller, timeout_s=wait_s, after=query.after)
    return responses.job(view, waited=preferred if waited else None)


@jobs.get("/<job_id>/events", operation_id="streamJobEvents")
def stream_events(path: JobPath, query: EventsQuery) -> Response:
    """Stream the events of a job (server-sent events)

    Each event has its number as id, so a client that reconnects with `Last-Event-ID` misses no event. The stream ends
    with the job. The answer is 204 if the job has ended and no event is left to send.

    The live events `progress` and `preview` have no id and are sent once. `progress` has `step` and `total_steps`.
    Jobs with `preview_every` also send `preview`: `index` of the image, `step`, `total_steps` and `image`. The `image`
    is a `data:` URL of a JPEG, at most 256 pixels per side.
    """
    return services.job_stream.event_stream(path.job_id, caller=g.caller, after=_last_event_id(query))


@jobs.post("/<job_id>/cancel", operation_id="cancelJob", responses={200: JobView})
def cancel_job(path: JobPath) -> JobView:
    """Cancel a job

    Canceling a canceled job changes nothing. For a job that has ended in another state the answer is 409.
    """
    return services.jobs.cancel(path.job_id, caller=g.caller)


@jobs.post("/<job_id>/retry", operation_id="retryJob", responses={202: JobView})
def retry_job(path: JobPath) -> Response:
    """Retry a job that did not succeed, as a new job

    Answers like `POST /generate`.
    """
    return submit_response(services.generation.retry(path.job_id, caller=g.caller, key=idempotency_key()))


@jobs.delete("/<job_id>", operation_id="deleteJob", responses={204: None})
def delete_job(path: JobPath) -> Response:
    """Delete an ended job with its outputs"""
    services.jobs.delete(path.job_id, caller=g.caller)
    return responses.no_content()


def _last_event_id(query: EventsQuery) -> int:
    last_id = request.headers.get("Last-Event-ID", "")
    if last_id and not (last_id.isascii() and last_id.isdigit() and len(last_id) < 16):
        raise problems.field_error("header.Last-Event-ID", "int_parsing", "Must be the number of an event.")
    return max(query.after or 0, int(last_id or 0))
