"""Following jobs: list, look, wait, stream, cancel, retry, delete."""

from uuid import UUID

from flask import Response, g, request
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import problems, responses
from api_service.http.blueprint import Resource
from api_service.services.views import API
from shared.contracts.common import Contract, Page
from shared.contracts.jobs import EventsQuery, JobQuery, JobView, JobWait

jobs = Resource("jobs", __name__, url_prefix=f"{API}/jobs", abp_tags=[Tag(name="jobs", description="Follow jobs.")])


class JobPath(Contract):
    job_id: UUID


@jobs.get("", operation_id="listJobs", responses={200: Page[JobView]})
def list_jobs(query: JobQuery) -> Page[JobView]:
    """The caller's jobs, newest first"""
    return services.jobs.page(query, caller=g.caller)


@jobs.get("/<job_id>", operation_id="getJob", responses={200: JobView})
def get_job(path: JobPath, query: JobWait) -> Response:
    """One job with its outputs

    `wait` (or `Prefer: wait=N`) makes it wait: until an event later than `after`, or without `after` until the job
    has ended. It answers with the job as it is when the time is over.
    """
    preferred = responses.preferred_wait_s()
    wait_s = preferred if query.wait is None else query.wait
    if not wait_s:
        return responses.job(services.job_stream.job(path.job_id, caller=g.caller))
    view, waited = services.job_stream.wait_for_job(
        path.job_id,
        caller=g.caller,
        timeout_s=wait_s,
        until=lambda job: job.state.is_final or (query.after is not None and job.seq > query.after),
    )
    return responses.job(view, waited=preferred if waited else None)


@jobs.get("/<job_id>/events", operation_id="streamJobEvents")
def stream_events(path: JobPath, query: EventsQuery) -> Response:
    """The job's story as server-sent events

    Each event of the log has its number as id, so that a client that reconnects with `Last-Event-ID` misses nothing;
    `progress` (`step`, `total_steps`) comes live, has no id and is told only once. So is `preview`, for jobs that ask
    by `preview_every`: `index` of the image, `step`, `total_steps`, and `image`, a `data:` URL of a JPEG of at most 256
    pixels a side. The stream ends with the job; 204 says that it already had.
    """
    return services.job_stream.event_stream(path.job_id, caller=g.caller, after=_last_seen(query))


@jobs.post("/<job_id>/cancel", operation_id="cancelJob", responses={200: JobView})
def cancel_job(path: JobPath) -> JobView:
    """Cancel a job

    Canceling one that is canceled already changes nothing; one that has ended otherwise gives 409.
    """
    return services.jobs.cancel(path.job_id, caller=g.caller)


@jobs.post("/<job_id>/retry", operation_id="retryJob", responses={202: JobView})
def retry_job(path: JobPath) -> Response:
    """Do it again as a new job, after an end without success"""
    return responses.accepted(services.generation.retry(path.job_id, caller=g.caller))


@jobs.delete("/<job_id>", operation_id="deleteJob", responses={204: None})
def delete_job(path: JobPath) -> Response:
    """Delete an ended job with its outputs"""
    services.jobs.delete(path.job_id, caller=g.caller)
    return responses.no_content()


def _last_seen(query: EventsQuery) -> int:
    last_id = request.headers.get("Last-Event-ID", "")
    if last_id and not (last_id.isascii() and last_id.isdigit() and len(last_id) < 16):
        raise problems.mistake("header.Last-Event-ID", "int_parsing", "Must be the id of an event.")
    return max(query.after or 0, int(last_id or 0))
