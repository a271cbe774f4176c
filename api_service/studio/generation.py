"""Studio's pages of jobs and outputs: create, follow and manage jobs, and view outputs."""

import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import orjson
import pydantic
from flask import Response, current_app, g, request

from api_service import services
from api_service.http import requests
from api_service.http.auth import statistics_owner
from api_service.studio.pages import (
    IMAGES_PER_PAGE,
    filled_fields,
    page_blueprint,
    read_form,
    redirect_to,
    render_page,
    wants_fragment,
)
from api_service.studio.search import (
    avoided_images,
    pinned_images,
    plan_key,
    plan_references,
    sent_concepts,
    sent_filter,
    sent_lines,
)
from shared.cache import cache_result
from shared.capabilities import supports
from shared.concepts import split_prompt
from shared.contracts.generation import (
    REFERENCE_FIELDS,
    DryRunView,
    GenerationParameters,
    Mode,
    PinnedReference,
    RagGenerateRequest,
)
from shared.contracts.images import ImageView
from shared.contracts.jobs import JobQuery, ReferenceKind
from shared.contracts.outputs import OutputQuery, RememberRequest
from shared.contracts.service import ModelView, StatsView
from shared.errors import EmbeddingUnavailableError

studio_generation = page_blueprint("studio_generation")

REQUEST_FIELDS = (
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
    "scheduler",
    "format",
    "quality",
)
SEARCH_ONLY_FIELDS = ("concepts", "split_prompt", "avoid", "avoid_ids")
"""Fields about a search. A request with chosen references has none."""
PREVIEW_EVERY = 4
RECENT_JOBS = 6
STATS_TTL_S = 2


@studio_generation.get("/")
def create() -> Response:
    """Show the form with the values of the query string, and the references for its prompt."""
    models = services.status.models().models
    plan, pinned, avoided, unavailable = None, list[ImageView](), list[ImageView](), None
    if "search" in g.caller.scopes:
        pinned, avoided = pinned_images(request.args), avoided_images(request.args)
        try:
            plan = plan_references(request.args, pinned, avoided)
        except EmbeddingUnavailableError as error:
            unavailable = error.message  # the job can be submitted nevertheless
    else:
        unavailable = "This API key cannot read the corpus, so the references are not shown. Jobs still use them."
    return render_page(
        "create",
        active="create",
        form=request.args,
        models=models,
        modes=_models_by_unable_mode(models),
        recent=services.jobs.list_page(JobQuery(limit=RECENT_JOBS), caller=g.caller).items,
        plan=plan,
        pinned=pinned,
        avoided=avoided,
        unavailable=unavailable,
    )


def _models_by_unable_mode(models: Sequence[ModelView]) -> dict[str, list[str]]:
    """Return every mode with the names of the models that are known to lack it."""
    return {
        mode.value: [each.name for each in models if each.capabilities and not supports(each.capabilities, mode)]
        for mode in Mode
    }


@studio_generation.post("/")
def generate() -> Response:
    generate_request = _request_from_form()
    submitted = services.generation.rag_generate(
        generate_request,
        caller=g.caller,
        decoder=current_app.extensions["decoder"],
        key=_idempotency_key(generate_request),
    )
    assert not isinstance(submitted, DryRunView)
    if wants_fragment():
        return render_page("job", active="create", job=submitted.view)
    return redirect_to("studio_generation.job", job_id=submitted.view.id)


def _idempotency_key(generate_request: RagGenerateRequest) -> str | None:
    """Return a key with which the same form, sent again, makes no second job; a changed form does."""
    once = request.form.get("once")
    return once and _digest(f"{once} {services.generation.fingerprint(generate_request)}")


def _form_key() -> str | None:
    """Return a key with which the same form, sent again, makes no second job."""
    once = request.form.get("once")
    return once and _digest(once)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _request_from_form() -> RagGenerateRequest:
    """Build the request from the form.

    If the person did not change the planned references, the request has their plan. Without a plan for exactly this
    form, the job searches itself. If references were pinned, dropped or weighted, the request pins exactly those that
    the form shows as used.
    """
    form = request.form
    sent = filled_fields(form, REQUEST_FIELDS)
    sent.poplist("collection")
    values = requests.field_values(RagGenerateRequest, sent, where="form")
    values["filter"] = sent_filter(form)
    concepts = sent_concepts(form)
    values["concepts"] = [{"text": text} for text in concepts or ()]
    values["split_prompt"] = concepts is not None
    values["avoid"], values["avoid_ids"] = sent_lines(form, "avoid"), form.getlist("avoid_ids")
    planned = dict(pair.split("=", 1) for pair in form.get("planned", "").split() if "=" in pair)
    chosen = [*form.getlist("pin"), *form.getlist("use")]
    used = {image_id: form.get(f"weight.{image_id}", "").strip() for image_id in chosen}
    if form.getlist("pin") or used != planned:
        values["reference_ids"] = [
            requests.parse_form(
                PinnedReference,
                {"image_id": image_id, "weight": weight or None, "concepts": form.getlist(f"concept.{image_id}")},
            )
            for image_id, weight in used.items()
        ]
        values = {name: value for name, value in values.items() if name not in SEARCH_ONLY_FIELDS}
        if not used:
            values["mode"] = Mode.NONE
    elif form.get("plan") and form.get("planned_for") == plan_key(form):
        values = {name: value for name, value in values.items() if name not in REFERENCE_FIELDS}
        values["plan"] = form["plan"]
    return requests.parse_form(RagGenerateRequest, {"preview_every": PREVIEW_EVERY, **values})


@studio_generation.get("/jobs/<uuid:job_id>")
def job(job_id: UUID) -> Response:
    view = services.jobs.get(job_id, caller=g.caller)
    return render_page("job", active="queue", job=view, create_values=_create_values(view.parameters))


def _create_values(recorded: dict[str, Any], references: Sequence[PinnedReference] = ()) -> dict[str, Any]:
    """Return the query values with which the page `create` repeats a job; only its prompt if another release wrote it.

    recorded: the parameters of the job. references: pinned instead of those that the job pins.
    """
    try:
        parameters = GenerationParameters.model_validate(recorded, extra="ignore")
    except pydantic.ValidationError:
        return {"prompt": recorded.get("prompt")}
    settings = parameters.model_dump(mode="json", include=set(REQUEST_FIELDS), exclude_none=True)
    conditions = parameters.filter.model_dump(mode="json", exclude={"collection"}, exclude_defaults=True)
    pinned = list(references or parameters.references)
    # The form has no pictures. Without them the job searches, with the service's number of references.
    sent_pictures = bool(parameters.reference_images)
    weights = {f"weight.{each.image_id}": each.weight or 1 for each in pinned}
    if parameters.max_gap is not None or parameters.matched_min_similarity is not None:
        del settings["min_similarity"]  # of a calibration; as the request's own it would be the whole rule
    return {
        **settings,
        "num_images": len(parameters.seeds),
        "concepts": None if pinned else _written_concepts(parameters),
        "avoid": _in_lines(parameters.avoid) or None,
        "avoid_ids": [str(image_id) for image_id in parameters.avoid_ids],
        "similar_examples_count": len(pinned) or (None if sent_pictures else parameters.k),
        "sent_pictures": 1 if sent_pictures else None,
        "collection": parameters.filter.collection,
        "filter": orjson.dumps(conditions).decode() if conditions else None,
        "pin": [str(each.image_id) for each in pinned],
        **(weights if any(each.weight for each in pinned) else {}),
    }


def _written_concepts(parameters: GenerationParameters) -> str | None:
    """Return the concepts of a job as lines; `None`: the prompt gives the same ones."""
    texts = [concept.text for concept in parameters.searched_concepts]
    return None if texts == split_prompt(parameters.prompt) else _in_lines(texts)


def _in_lines(texts: Sequence[str]) -> str:
    return "\n".join(" ".join(text.split()) for text in texts)


@studio_generation.post("/jobs/<uuid:job_id>/cancel")
def cancel(job_id: UUID) -> Response:
    services.jobs.cancel(job_id, caller=g.caller)
    return redirect_to("studio_generation.job", job_id=job_id)


@studio_generation.post("/jobs/<uuid:job_id>/retry")
def retry(job_id: UUID) -> Response:
    submitted = services.generation.retry(job_id, caller=g.caller, key=_form_key())
    return redirect_to("studio_generation.job", job_id=submitted.view.id)


@studio_generation.post("/jobs/<uuid:job_id>/delete")
def delete(job_id: UUID) -> Response:
    services.jobs.delete(job_id, caller=g.caller)
    return redirect_to("studio_generation.queue")


@studio_generation.get("/gallery")
def gallery() -> Response:
    query = read_form(OutputQuery, request.args, ("cursor",), limit=IMAGES_PER_PAGE)
    return render_page("gallery", active="gallery", outputs=services.outputs.list_page(query, caller=g.caller))


@studio_generation.get("/gallery/<uuid:generation_id>")
def output(generation_id: UUID) -> Response:
    """Show an output with its references and its provenance."""
    view = services.outputs.get(generation_id, caller=g.caller)
    references = [
        PinnedReference.recorded(each.image_id, each.weight)
        for each in view.references
        if each.kind is ReferenceKind.CORPUS
    ]
    # The record has the output's own seed instead of the seeds of its job.
    recorded = {**view.provenance.get("parameters", {}), "seeds": [view.seed]}
    create_values = _create_values(recorded, references)
    return render_page("output", active="gallery", output=view, create_values=create_values)


@studio_generation.post("/gallery/<uuid:generation_id>/replay")
def replay(generation_id: UUID) -> Response:
    submitted = services.generation.replay(generation_id, caller=g.caller, key=_form_key())
    return redirect_to("studio_generation.job", job_id=submitted.view.id)


@studio_generation.post("/gallery/<uuid:generation_id>/remember")
def remember(generation_id: UUID) -> Response:
    """Add the output to the corpus. Sending it twice does no harm, because a collection has each file once."""
    decoder = current_app.extensions["decoder"]
    remembered = services.outputs.remember(generation_id, RememberRequest(), caller=g.caller, decoder=decoder)
    return redirect_to("studio_corpus.image", image_id=remembered.image.id)


@studio_generation.post("/gallery/<uuid:generation_id>/delete")
def delete_output(generation_id: UUID) -> Response:
    services.outputs.delete(generation_id, caller=g.caller)
    return redirect_to("studio_generation.gallery")


@studio_generation.get("/queue")
def queue() -> Response:
    query = read_form(JobQuery, request.args, ("state", "cursor"))
    owner_id = statistics_owner(g.caller)
    return render_page(
        "queue",
        active="queue",
        jobs=services.jobs.list_page(query, caller=g.caller),
        query=query,
        stats=_stats(owner_id),
        counts_everything=owner_id is None,
    )


@cache_result(key_prefix="studio", ttl=STATS_TTL_S)
def _stats(owner_id: UUID | None) -> StatsView:
    """Return cached statistics, because counting reads whole tables. owner_id: as in `services.status.stats`."""
    return services.status.stats(owner_id=owner_id)
