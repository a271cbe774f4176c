"""Submitting: images from a prompt, with or without what the corpus remembers."""

import re
from contextlib import suppress

from flask import Response, g, request
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import problems, responses
from api_service.http.blueprint import Resource
from api_service.services.views import API
from shared.contracts.generation import DryRunView, GenerateRequest, RagGenerateRequest
from shared.contracts.jobs import JobView
from shared.errors import ResourceNotFoundError

KEY = re.compile(r"[\x21-\x7e]{1,255}")

generation = Resource(
    "generation", __name__, url_prefix=API, abp_tags=[Tag(name="generation", description="Submit jobs.")]
)


@generation.post("/generate", operation_id="generate", responses={202: JobView})
def generate(body: GenerateRequest) -> Response:
    """Generate images from a prompt alone

    Answers 202 with the queued job, to be polled at `Location`. With `Prefer: wait=N` it waits up to N seconds and
    answers 200 when the job has ended by then. With `dry_run` it answers 200 with what would run. A request sent
    again with the same `Idempotency-Key` within 24 hours makes no second job: it gets the first one's answer, with
    `Idempotent-Replayed: true`.
    """
    return accepted(services.generation.generation(body, caller=g.caller, key=idempotency_key()))


@generation.post("/rag/generate", operation_id="ragGenerate", responses={202: JobView})
def rag_generate(body: RagGenerateRequest) -> Response:
    """Generate images conditioned on the nearest images of the corpus

    References are searched by the prompt, or pinned by `reference_ids`. Answers as `POST /generate`.
    """
    return accepted(services.generation.rag_generation(body, caller=g.caller, key=idempotency_key()))


def accepted(submitted: services.generation.Submitted | DryRunView) -> Response:
    if isinstance(submitted, DryRunView):
        return responses.json(submitted)
    view, waited = submitted.view, None
    wait_s = responses.preferred_wait_s()
    if wait_s is not None:
        # A replayed job may be gone by now; then the answer of then is all there is.
        with suppress(ResourceNotFoundError):
            view, held = services.job_stream.wait_for_job(
                view.id, caller=g.caller, timeout_s=wait_s, until=lambda job: job.state.is_final
            )
            waited = wait_s if held else None
    response = responses.accepted(view, waited=waited)
    if submitted.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def idempotency_key() -> str | None:
    """The request's `Idempotency-Key`, if it has one.

    Raises:
        ValidationError: it is none.
    """
    key = request.headers.get("Idempotency-Key")
    if key is not None and not KEY.fullmatch(key):
        raise problems.mistake(
            "header.Idempotency-Key", "string_pattern_mismatch", "Must be 1 to 255 visible characters."
        )
    return key
