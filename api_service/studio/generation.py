"""Writing a prompt, watching what becomes of it, and looking at what was made."""

import hashlib
from typing import Any
from uuid import UUID, uuid4

from flask import Response, g, request

from api_service import services
from api_service.http import requests
from api_service.studio.pages import PICTURES, filled, is_fragment, page, pages, read, to
from api_service.studio.search import pinned_images, plan
from shared.cache import cache_result
from shared.contracts.generation import DryRunView, GenerationParameters, Mode, PinnedReference, RagGenerateRequest
from shared.contracts.images import ImageView
from shared.contracts.jobs import JobQuery, JobView
from shared.contracts.outputs import OutputQuery
from shared.contracts.service import StatsView
from shared.errors import EmbeddingUnavailableError

studio_generation = pages("studio_generation")

SETTINGS = (
    "prompt",
    "negative_prompt",
    "model",
    "num_images",
    "seed",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "mode",
    "strength",
    "ip_adapter_scale",
    "similar_examples_count",
    "min_similarity",
    "collection",
)
PREVIEW_EVERY = 4
RECENT = 6
STATS_TTL_S = 2


@studio_generation.get("/")
def create() -> Response:
    """The prompt, and what it would be drawn from, filled in with what the address says."""
    shown, pinned, away = None, list[ImageView](), None
    if "search" in g.caller.scopes:
        pinned = pinned_images(request.args)
        try:
            shown = plan(request.args, pinned)
        except EmbeddingUnavailableError as error:
            away = error.message  # a prompt can be written and queued all the same
    else:
        away = "This API key may not look at what is remembered. Jobs draw from it all the same."
    return page(
        "create",
        active="create",
        form=request.args,
        models=services.status.models().models,
        recent=services.jobs.page(JobQuery(limit=RECENT), caller=g.caller).items,
        plan=shown,
        pinned=pinned,
        away=away,
        once=uuid4().hex,
    )


@studio_generation.post("/")
def generate() -> Response:
    wanted = _wanted()
    submitted = services.generation.rag_generation(wanted, caller=g.caller, key=_once(wanted))
    assert not isinstance(submitted, DryRunView)
    if is_fragment():
        return page("job", active="create", job=submitted.view)
    return to("studio_generation.job", job_id=submitted.view.id)


def _once(wanted: RagGenerateRequest) -> str | None:
    """An idempotency key: the same form sent again, because no answer came, makes no second job; a changed one does."""
    once = request.form.get("once")
    return (
        None if not once else hashlib.sha256(f"{once} {services.generation.fingerprint(wanted)}".encode()).hexdigest()
    )


def _wanted() -> RagGenerateRequest:
    """The request that the form means.

    A plan that was left as it was found is left to the job's own search, which finds the same and tells why. Where
    something was pinned, dropped or weighed, exactly what the form shows as used counts.
    """
    form = request.form
    sent = filled(form, SETTINGS)
    collection = sent.pop("collection", None)
    values = requests.fields(RagGenerateRequest, sent, where="form")
    if collection:
        values["filter"] = {"collection": collection}
    planned = dict(pair.split("=", 1) for pair in form.get("planned", "").split() if "=" in pair)
    chosen = [*form.getlist("pin"), *form.getlist("use")]
    used = {image_id: form.get(f"weight.{image_id}", "").strip() for image_id in chosen}
    if form.getlist("pin") or used != planned:
        values["reference_ids"] = [
            requests.form(PinnedReference, {"image_id": image_id, "weight": weight or None})
            for image_id, weight in used.items()
        ]
        if not used:
            values["mode"] = Mode.NONE
    return requests.form(RagGenerateRequest, {"preview_every": PREVIEW_EVERY, **values})


@studio_generation.get("/jobs/<uuid:job_id>")
def job(job_id: UUID) -> Response:
    view = services.job_stream.job(job_id, caller=g.caller)
    return page("job", active="queue", job=view, again=_again(view))


def _again(job: JobView) -> dict[str, Any]:
    """What the page `create` is to be filled in with to draw it again."""
    parameters = GenerationParameters.model_validate(job.parameters, extra="ignore")
    settings = parameters.model_dump(mode="json", include=set(SETTINGS), exclude_none=True)
    pinned = [str(reference.image_id) for reference in parameters.references]
    return {**settings, "num_images": len(parameters.seeds), "collection": parameters.filter.collection, "pin": pinned}


@studio_generation.post("/jobs/<uuid:job_id>/cancel")
def cancel(job_id: UUID) -> Response:
    services.jobs.cancel(job_id, caller=g.caller)
    return to("studio_generation.job", job_id=job_id)


@studio_generation.post("/jobs/<uuid:job_id>/retry")
def retry(job_id: UUID) -> Response:
    return to("studio_generation.job", job_id=services.generation.retry(job_id, caller=g.caller).id)


@studio_generation.post("/jobs/<uuid:job_id>/delete")
def delete(job_id: UUID) -> Response:
    services.jobs.delete(job_id, caller=g.caller)
    return to("studio_generation.queue")


@studio_generation.get("/gallery")
def gallery() -> Response:
    query = read(OutputQuery, request.args, ("cursor",), limit=PICTURES)
    return page("gallery", active="gallery", outputs=services.outputs.list_page(query, caller=g.caller))


@studio_generation.get("/gallery/<uuid:generation_id>")
def output(generation_id: UUID) -> Response:
    """One image beside the memories that shaped it, and all that decided its pixels."""
    return page("output", active="gallery", output=services.outputs.get(generation_id, caller=g.caller))


@studio_generation.post("/gallery/<uuid:generation_id>/replay")
def replay(generation_id: UUID) -> Response:
    return to("studio_generation.job", job_id=services.generation.replay(generation_id, caller=g.caller).view.id)


@studio_generation.post("/gallery/<uuid:generation_id>/delete")
def delete_output(generation_id: UUID) -> Response:
    services.outputs.delete(generation_id, caller=g.caller)
    return to("studio_generation.gallery")


@studio_generation.get("/queue")
def queue() -> Response:
    query = read(JobQuery, request.args, ("state", "cursor"))
    return page("queue", active="queue", jobs=services.jobs.page(query, caller=g.caller), query=query, stats=_stats())


@cache_result(key_prefix="studio", ttl=STATS_TTL_S)
def _stats() -> StatsView:
    """Counted once for all who look: it reads whole tables."""
    return services.status.stats()
