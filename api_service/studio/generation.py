"""Studio's pages of jobs: create, follow, repeat and delete them."""

import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import orjson
import pydantic
from flask import Response, current_app, g, request
from werkzeug.datastructures import MultiDict

from api_service import services
from api_service.studio.choices import Choices
from api_service.studio.create_form import (
    LORA_FIELD,
    REQUEST_FIELDS,
    as_curl,
    as_python,
    named_outputs,
    request_for_reading,
    request_of_form,
)
from api_service.studio.pages import page_blueprint, redirect_to, render_page, show_errors_on, wants_fragment
from api_service.studio.search import (
    ShownReferences,
    avoided_images,
    found_memories,
    pinned_images,
    shown_references,
)
from api_service.studio.translations import _
from shared.capabilities import supports
from shared.concepts import split_prompt
from shared.contracts.generation import DryRunView, GenerationParameters, Mode, PinnedReference, RagGenerateRequest
from shared.contracts.jobs import JobQuery, JobState
from shared.contracts.search import SearchResponse
from shared.contracts.service import ModelView
from shared.errors import BaseAppException, ValidationError

studio_generation = page_blueprint("studio_generation")

RECENT_JOBS = 6


@studio_generation.get("/")
def create() -> Response:
    """Show the form with the values of the query string, and the references for its prompt."""
    return _create_page(request.args)


def _create_page(form: "MultiDict[str, str]", *, pictures: int = 0) -> Response:
    """form: the values of the form's fields. pictures: number of pictures that were sent with it."""
    models = services.status.models().models
    found, not_found_because = _found_memories(form)
    return render_page(
        "create",
        active="create",
        form=form,
        models=models,
        model=_chosen_model(models, form.get("model")),
        modes=_models_by_unable_mode(models),
        unable_to_avoid=[
            each.name for each in models if each.capabilities and not each.capabilities.supports_negative_prompt
        ],
        loras=_models_by_lora(models),
        recent=services.jobs.list_page(JobQuery(limit=RECENT_JOBS), caller=g.caller).items,
        places=services.status.places_before_model(),
        shown=_shown_references(form, pictures=pictures),
        found=found,
        not_found_because=not_found_because,
        outputs=named_outputs(form),
    )


def _shown_references(form: "MultiDict[str, str]", *, pictures: int) -> ShownReferences:
    if "search" not in g.caller.scopes:
        problem = _("This API key cannot read the corpus, so the references are not shown. Jobs still use them.")
        return ShownReferences(Choices.of(MultiDict()), problem=problem)
    try:
        return shown_references(form, pictures=pictures)
    except BaseAppException as error:
        # The form stays usable: the job can be submitted, or the wrong field changed.
        pinned, avoided = pinned_images(form), avoided_images(form)
        return ShownReferences(Choices.of(form), pinned=pinned, avoided=avoided, problem=_reason(error))


def _found_memories(form: "MultiDict[str, str]") -> tuple[SearchResponse | None, str | None]:
    """Return the images that the form searches, and the reason why they cannot be shown."""
    try:
        return (found_memories(form) if "search" in g.caller.scopes else None), None
    except BaseAppException as error:
        return None, _reason(error)


def _reason(error: BaseAppException) -> str:
    if isinstance(error, ValidationError):
        return " ".join(each["message"] for each in error.errors)
    return error.message


def _chosen_model(models: Sequence[ModelView], name: str | None) -> ModelView:
    """Return the model of this name, else the default one."""
    return next((each for each in models if each.name == name), next(each for each in models if each.default))


def _models_by_unable_mode(models: Sequence[ModelView]) -> dict[str, list[str]]:
    """Return every mode with the names of the models that are known to lack it."""
    return {
        mode.value: [each.name for each in models if each.capabilities and not supports(each.capabilities, mode)]
        for mode in Mode
    }


def _models_by_lora(models: Sequence[ModelView]) -> dict[str, list[str]]:
    """Return every LoRA with the names of the models that have it."""
    by_lora: dict[str, list[str]] = {}
    for model in models:
        for name in model.capabilities.loras if model.capabilities else []:
            by_lora.setdefault(name, []).append(model.name)
    return by_lora


@studio_generation.post("/")
def generate() -> Response:
    show_errors_on(lambda: _create_page(request.form, pictures=len(request.files.getlist("reference_image"))))
    generate_request = request_of_form()
    submitted = services.generation.rag_generate(
        generate_request,
        caller=g.caller,
        decoder=current_app.extensions["decoder"],
        key=_idempotency_key(generate_request),
    )
    assert not isinstance(submitted, DryRunView)
    if wants_fragment():
        return render_page("job", active="create", job=submitted.view, places={}, create_values={})
    return redirect_to("studio_generation.job", job_id=submitted.view.id)


@studio_generation.post("/request")
def show_request() -> Response:
    """Show the request of the form as programs send it."""
    show_errors_on(lambda: _create_page(request.form))
    sent = request_of_form(with_plan=False)
    shown, pictures = request_for_reading(sent), len(sent.reference_images)
    address = request.url_root.rstrip("/")
    return render_page(
        "request",
        active="create",
        sent=shown,
        pictures=pictures,
        curl=as_curl(shown, pictures=pictures, address=address),
        python=as_python(shown, pictures=pictures, address=address),
    )


def _idempotency_key(generate_request: RagGenerateRequest) -> str | None:
    """Return a key with which the same form, sent again, makes no second job; a changed form does."""
    once = request.form.get("once")
    return once and _digest(f"{once} {services.generation.fingerprint(generate_request)}")


def form_key() -> str | None:
    """Return a key with which the same form, sent again, makes no second job."""
    once = request.form.get("once")
    return once and _digest(once)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@studio_generation.get("/jobs/<uuid:job_id>")
def job(job_id: UUID) -> Response:
    view = services.jobs.get(job_id, caller=g.caller)
    places = services.status.places_before_model() if view.state is JobState.PROCESSING else {}
    create_values = create_values_of(view.parameters)
    events = services.jobs.list_events(job_id, caller=g.caller) if view.state.is_final else []
    return render_page("job", active="queue", job=view, places=places, create_values=create_values, events=events)


def create_values_of(recorded: dict[str, Any], references: Sequence[PinnedReference] = ()) -> dict[str, Any]:
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
        **{f"{LORA_FIELD}{name}": scale for name, scale in parameters.loras.items()},
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
    return _after_action(job_id)


@studio_generation.post("/jobs/<uuid:job_id>/retry")
def retry(job_id: UUID) -> Response:
    submitted = services.generation.retry(job_id, caller=g.caller, key=form_key())
    return _after_action(submitted.view.id)


def _after_action(job_id: UUID) -> Response:
    """Return to the page with the button: the queue, or the page of the job."""
    if request.form.get("from") == "queue":
        return redirect_to("studio_queue.queue")
    return redirect_to("studio_generation.job", job_id=job_id)


@studio_generation.post("/jobs/<uuid:job_id>/delete")
def delete(job_id: UUID) -> Response:
    services.jobs.delete(job_id, caller=g.caller)
    return redirect_to("studio_queue.queue")
