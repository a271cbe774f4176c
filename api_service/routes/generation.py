"""Routes that submit jobs: images from a prompt, with or without references from the corpus."""

import re
from contextlib import suppress

from flask import Response, current_app, g, request
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import multipart, problems, requests, responses
from api_service.http.blueprint import ApiBlueprint
from api_service.http.urls import API
from shared.contracts.generation import DryRunView, GenerateRequest, RagGenerateRequest
from shared.contracts.jobs import JobView
from shared.errors import ResourceNotFoundError

VALID_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")

generation = ApiBlueprint(
    "generation", __name__, url_prefix=API, abp_tags=[Tag(name="generation", description="Submit jobs.")]
)


@generation.post("/generate", operation_id="generate", responses={202: JobView})
def generate(body: GenerateRequest) -> Response:
    """Generate images from a prompt alone

    The answer is 202 with the queued job; poll it at `Location`. With `Prefer: wait=N` the service waits up to N
    seconds, and answers 200 if the job has ended by then. With `dry_run` it answers 200 with the resolved request, and
    queues nothing.

    A request repeated with the same `Idempotency-Key` within 24 hours makes no second job. It gets the answer of the
    first one, with `Idempotent-Replayed: true`.
    """
    return submit_response(services.generation.generate(body, caller=g.caller, key=idempotency_key()))


@generation.post("/rag/generate", operation_id="ragGenerate", responses={202: JobView})
def rag_generate() -> Response:
    """Generate images conditioned on the nearest images of the corpus

    The references are the images nearest to the prompt, or those in `reference_ids` and `reference_images`. Answers
    like `POST /generate`.

    Send JSON, or multipart with the JSON in the field `request` and pictures as files under `reference_image`.
    """
    if multipart.is_multipart(request):
        body = multipart.rag_generate_request(request)
    else:
        body = requests.parse_json_body(RagGenerateRequest, request)
    submitted = services.generation.rag_generate(
        body, caller=g.caller, decoder=current_app.extensions["decoder"], key=idempotency_key()
    )
    return submit_response(submitted)


def submit_response(submitted: services.generation.Submitted | DryRunView) -> Response:
    """Answer a submit; wait for the job first if the request prefers that."""
    if isinstance(submitted, DryRunView):
        return responses.json(submitted)
    view, waited = submitted.view, None
    wait_s = responses.preferred_wait_s()
    if wait_s is not None:
        # The job of a repeated request may be deleted by now. The stored answer is then sent as it is.
        with suppress(ResourceNotFoundError):
            view, was_waited = services.job_stream.wait_for_job(view.id, caller=g.caller, timeout_s=wait_s, known=view)
            waited = wait_s if was_waited else None
    response = responses.accepted(view, waited=waited)
    if submitted.already_submitted:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def idempotency_key() -> str | None:
    """Return the request's `Idempotency-Key`; `None`: it has none.

    Raises:
        ValidationError: the key is not 1 to 255 visible ASCII characters.
    """
    key = request.headers.get("Idempotency-Key")
    if key is not None and not VALID_IDEMPOTENCY_KEY.fullmatch(key):
        raise problems.field_error(
            "header.Idempotency-Key", "string_pattern_mismatch", "Must be 1 to 255 visible ASCII characters."
        )
    return key
