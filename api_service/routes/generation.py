"""Submitting: images from a prompt, with or without what the corpus remembers."""

from flask import Response, g
from flask_openapi3.models.tag import Tag

from api_service import respond, submit, waiting
from api_service.resource import Resource
from api_service.views import API
from shared.contracts.generation import DryRunView, GenerateRequest, RagGenerateRequest
from shared.contracts.jobs import JobView

generation = Resource(
    "generation", __name__, url_prefix=API, abp_tags=[Tag(name="generation", description="Submit jobs.")]
)


@generation.post("/generate", operation_id="generate", responses={202: JobView})
def generate(body: GenerateRequest) -> Response:
    """Generate images from a prompt alone

    Answers 202 with the queued job, to be polled at `Location`. With `Prefer: wait=N` it waits up to N seconds and
    answers 200 when the job has ended by then. With `dry_run` it answers 200 with what would run.
    """
    return _accepted(submit.generation(body, caller=g.caller))


@generation.post("/rag/generate", operation_id="ragGenerate", responses={202: JobView})
def rag_generate(body: RagGenerateRequest) -> Response:
    """Generate images conditioned on the nearest images of the corpus

    References are searched by the prompt, or pinned by `reference_ids`. Answers as `POST /generate`.
    """
    return _accepted(submit.rag_generation(body, caller=g.caller))


def _accepted(submitted: JobView | DryRunView) -> Response:
    if isinstance(submitted, DryRunView):
        return respond.json(submitted)
    wait_s = respond.preferred_wait_s()
    if wait_s is None:
        return respond.accepted(submitted)
    job, waited = waiting.wait_for_job(
        submitted.id, caller=g.caller, timeout_s=wait_s, until=lambda job: job.state.is_final
    )
    return respond.accepted(job, waited=wait_s if waited else None)
