"""Use cases that submit jobs.

A request is resolved here, once: the job stores every value that does not depend on the corpus or the loaded model.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
import pydantic
from sqlalchemy.orm import Session
from structlog.contextvars import bind_contextvars

from api_service.http.auth import Caller
from api_service.services import plans, reference_images, views
from api_service.services.collections import find_collection
from api_service.services.stored_blobs import session_for_rows_of
from shared import metrics, prompt_planner
from shared.capabilities import check_parameters, default_references, drawable_size, resolve_defaults
from shared.contracts.calibration import Calibration
from shared.contracts.collections import CollectionDefaults
from shared.contracts.generation import (
    DryRunView,
    GenerateRequest,
    GenerationParameters,
    Mode,
    PinnedReference,
    RagGenerateRequest,
    ResolvedConcept,
    ResolvedReferenceImage,
    seeds_from,
)
from shared.contracts.jobs import JobKind, JobView, Lane, ReferenceKind
from shared.contracts.search import ImageFilter, SearchMode
from shared.contracts.service import Capabilities
from shared.db import (
    admission,
    collections,
    idempotency,
    images,
    jobs,
    outputs,
    queue_limits,
    spaces,
    withdrawals,
)
from shared.db.collections import defaults_of
from shared.db.session import session_scope
from shared.db.tables import Job, Output, OutputReference
from shared.errors import (
    OriginalUnreadableError,
    ReferenceUnavailableError,
    UnsupportedParameterError,
    UnsupportedSizeError,
)
from shared.imaging import DecodedImage, UploadDecoder
from shared.messaging.coalesce import dispatch_soon
from shared.messaging.job_updates import publish_job_update
from shared.retrieval import resolve_gate
from shared.settings import GeneratorSettings, Settings, get_settings
from shared.ssrf import check_url

REPLAY_ROUTE, RETRY_ROUTE = "replay", "retry"
"""Names under which the idempotency keys of replays and retries are stored."""


@dataclass(frozen=True)
class Submitted:
    """An accepted job."""

    view: JobView
    already_submitted: bool = False
    """The idempotency key belongs to an earlier request, and `view` is the answer to that request."""


def generate(request: GenerateRequest, *, caller: Caller, key: str | None = None) -> Submitted | DryRunView:
    """Queue a job that generates images from a prompt alone.

    Raises:
        ModelNotFoundError: no model of this name is configured.
        UnsupportedSizeError: the model cannot draw the exact size.
        UnsupportedParameterError: the model does not support the scheduler, a LoRA or a parameter.
        ForbiddenTargetError: the webhook has a URL to which the service does not send.
        IdempotencyKeyReusedError: `key` was sent with another request in the last 24 hours.
        OwnerQueueFullError: the owner has reached its limit of queued jobs.
        QueueFullError: the service has reached its limit of queued jobs.
        QuotaExceededError: the images exceed the owner's quota of today.
        DatabaseConnectionError: the database does not answer.
    """
    return _submit(JobKind.GENERATE, request, retrieval_of(request), caller=caller, key=key)


def rag_generate(
    request: RagGenerateRequest, *, caller: Caller, decoder: UploadDecoder, key: str | None = None
) -> Submitted | DryRunView:
    """Queue a job that generates images conditioned on the nearest corpus images, or on the request's references.

    Raises:
        Exception: all errors of `generate`.
        UnsupportedModeError: the model cannot work in the requested mode.
        ReferenceUnavailableError: a pinned image does not exist, is not visible to the caller, or is not searchable.
        PlanInvalidError, PlanExpiredError, PlanMismatchError, PlanOutdatedError: as `plans.redeem`.
        ValidationError: no collection has the requested name, or a picture is not base64.
        InvalidImageError: a picture is not an image that the service accepts.
        DecoderBusyError, UploadInterruptedError, StorageError: as an upload, for a request with pictures.
    """
    retrieval, pictures = retrieval_of(request), list[DecodedImage]()
    if request.reference_images:
        # Decoding takes long. So a request that was answered before, or that cannot run, gets its answer before it.
        with session_scope() as session:
            known = _find_answer(session, JobKind.RAG_GENERATE, request, caller=caller, key=key)
            if known is not None:
                return known
            _resolve_and_check(session, request, retrieval, caller=caller, settings=get_settings())
        pictures = reference_images.decode(request.reference_images, caller=caller, decoder=decoder)
    return _submit(JobKind.RAG_GENERATE, request, retrieval, caller=caller, key=key, pictures=pictures)


def retry(job_id: UUID, *, caller: Caller, key: str | None = None) -> Submitted:
    """Queue a new job that repeats one that ended without success.

    Raises:
        ResourceNotFoundError: the caller has no job with this id.
        JobStateError: the job has not ended, or has succeeded.
        JobUnreadableError: another release accepted the job, in a form that this release cannot read.
        ModelNotFoundError: the model of the job is not configured any more.
        ReferenceUnavailableError: a pinned reference does not exist any more.
        CollectionUnavailableError: the same is true of a collection.
        IdempotencyKeyReusedError, OwnerQueueFullError, QueueFullError, QuotaExceededError, DatabaseConnectionError:
            as `generate`.
    """
    settings = get_settings()
    with session_scope() as session:
        if key is not None:
            known = idempotency.begin(
                session, owner_id=caller.owner_id, route=RETRY_ROUTE, key=key, fingerprint=str(job_id)
            )
            if known is not None:
                return Submitted(_stored_view(session, known, caller=caller), already_submitted=True)
        # Locked: a delete at the same time must not take the pictures away between the two reads.
        old = jobs.get(session, job_id, owner_id=caller.owner_id, lock=True)
        queue_limits.refuse_when_full(session, caller.owner_id, settings.queue)
        jobs_ahead = admission.read(session, model=old.model, lane=list(Lane)[old.lane]).jobs_ahead
        job = jobs.insert_retry(session, old, limits=settings.limits)
        reference_images.copy(session, from_job_id=old.id, to_job_id=job.id)
        settings.model.generator(job.model)  # raises when the model is not configured any more
        parameters = GenerationParameters.model_validate(job.parameters)
        _check_pinned_images(session, parameters.references, caller=caller)
        for where in parameters.searched_filters:
            collections.get_by_name(session, where.collection, principal=caller.principal)
        view = _finish_submit(session, job, jobs_ahead=jobs_ahead, route=RETRY_ROUTE, caller=caller, key=key)
    return _dispatch(view)


def replay(generation_id: UUID, *, caller: Caller, key: str | None = None) -> Submitted:
    """Queue a job that draws an output again from its record, and compares the two.

    Raises:
        ResourceNotFoundError: the caller has no output with this id.
        OutputWithdrawnError: the output was withdrawn.
        ReferenceUnavailableError: a reference of the output does not exist any more.
        ModelNotFoundError: the model of the output is not configured any more.
        OriginalUnreadableError: another release recorded the output, in a form that this release cannot read.
        IdempotencyKeyReusedError, OwnerQueueFullError, QueueFullError, QuotaExceededError, DatabaseConnectionError:
            as `generate`.
    """
    settings = get_settings()
    with session_scope() as session:
        if key is not None:
            known = idempotency.begin(
                session, owner_id=caller.owner_id, route=REPLAY_ROUTE, key=key, fingerprint=str(generation_id)
            )
            if known is not None:
                withdrawals.refuse_withdrawn(session, generation_id)
                return Submitted(_stored_view(session, known, caller=caller), already_submitted=True)
        original = outputs.get(session, generation_id, owner_id=caller.owner_id)
        used = outputs.list_references(session, [original.id]).get(original.id, [])
        parameters = _recorded_parameters(original, used)
        settings.model.generator(parameters.model)  # raises when the model is not configured any more
        _check_pinned_images(session, parameters.references, caller=caller)
        queue_limits.refuse_when_full(session, caller.owner_id, settings.queue)
        jobs_ahead = admission.read(session, model=parameters.model, lane=Lane.NORMAL).jobs_ahead
        job = jobs.insert(
            session,
            owner_id=caller.owner_id,
            kind=JobKind.RAG_GENERATE if parameters.named_references else JobKind.GENERATE,
            lane=Lane.NORMAL,
            parameters=parameters,
            metadata={},
            timeout_s=settings.jobs.timeout_s,
            replay_of=original.id,
            limits=settings.limits,
        )
        sent_ids = [each.image_id for each in used if each.kind == ReferenceKind.REQUEST]
        reference_images.copy(session, from_job_id=original.job_id, to_job_id=job.id, only=sent_ids)
        view = _finish_submit(session, job, jobs_ahead=jobs_ahead, route=REPLAY_ROUTE, caller=caller, key=key)
    return _dispatch(view)


def _recorded_parameters(original: Output, references: Sequence[OutputReference]) -> GenerationParameters:
    """Return the parameters that draw one output again: its own seed, mode and references, without a search."""
    concepts = {each["image_id"]: each.get("concepts", []) for each in original.provenance.get("references", [])}
    try:
        return GenerationParameters.model_validate(
            {
                **original.provenance["parameters"],
                "seeds": [original.seed],
                "mode": original.provenance["mode"],
                "k": 0,
                "references": [
                    PinnedReference.recorded(
                        each.image_id, each.weight, concepts=concepts.get(str(each.image_id), []), pinned=each.pinned
                    )
                    for each in references
                    if each.kind == ReferenceKind.CORPUS
                ],
                "reference_images": [
                    {"sha256": each.sha256, "weight": each.weight, "caption": each.caption}
                    for each in references
                    if each.kind == ReferenceKind.REQUEST
                ],
            }
        )
    except (pydantic.ValidationError, KeyError) as error:
        raise OriginalUnreadableError(generation_id=str(original.id)) from error


@dataclass(frozen=True)
class Retrieval:
    """The part of a request that is about references; `None`: the service chooses the value."""

    mode: Mode
    k: int | None = None
    min_similarity: float | None = None
    where: ImageFilter = field(default_factory=ImageFilter)
    concepts: Sequence[ResolvedConcept] = ()
    avoid: Sequence[str] = ()
    avoid_ids: Sequence[UUID] = ()
    pinned: Sequence[PinnedReference] = ()
    pictures: Sequence[ResolvedReferenceImage] = ()
    planned_at: datetime | None = None
    """When the plan was made whose references are in `pinned`."""
    ip_adapter_scale: float | None = None
    strength: float | None = None

    @property
    def searched(self) -> bool:
        """Whether references are searched; otherwise the filter is not used."""
        named = self.pinned or self.pictures or self.planned_at is not None
        return self.mode is not Mode.NONE and not named


def retrieval_of(
    request: GenerateRequest, *, split: Callable[[str], list[str]] = prompt_planner.concepts_of
) -> Retrieval:
    """Return the part of the request that is about references. split: finds the concepts of a prompt.

    Raises:
        ValidationError: a picture is not base64.
    """
    if not isinstance(request, RagGenerateRequest):
        return Retrieval(mode=Mode.NONE)
    return Retrieval(
        mode=request.mode,
        k=request.similar_examples_count,
        min_similarity=request.min_similarity,
        where=request.filter,
        concepts=_concepts(request, split),
        avoid=request.avoid,
        avoid_ids=request.avoid_ids,
        pinned=request.pinned,
        pictures=reference_images.resolve(request.reference_images),
        ip_adapter_scale=request.ip_adapter_scale,
        strength=request.strength,
    )


def _concepts(request: RagGenerateRequest, split: Callable[[str], list[str]]) -> list[ResolvedConcept]:
    """Return the things for which references are searched; an empty list: the prompt as a whole, or no search."""
    searches = request.mode is not Mode.NONE and request.similar_examples_count != 0
    if not searches or request.reference_ids or request.reference_images or request.plan:
        return []
    if request.concepts:
        return [ResolvedConcept(text=each.text, k=each.k, filter=each.filter) for each in request.concepts]
    return [ResolvedConcept(text=text) for text in split_texts(request.prompt, split)] if request.split_prompt else []


def split_texts(prompt: str, split: Callable[[str], list[str]]) -> list[str]:
    """Return the texts of the concepts of a prompt, each once; an empty list: the prompt as a whole."""
    texts: dict[str, str] = {}
    for text in split(prompt):
        texts.setdefault(text.casefold(), text)
    return [] if list(texts.values()) == [prompt] else list(texts.values())


def _submit(
    kind: JobKind,
    request: GenerateRequest,
    retrieval: Retrieval,
    *,
    caller: Caller,
    key: str | None,
    pictures: Sequence[DecodedImage] = (),
) -> Submitted | DryRunView:
    """Queue the job. pictures: those of the request, decoded."""
    settings = get_settings()
    with session_for_rows_of({} if request.dry_run else reference_images.new_blobs(pictures)) as session:
        if request.webhook is not None:
            check_url(request.webhook.url, settings.webhooks)
        if key is not None and not request.dry_run:
            known = idempotency.begin(
                session, owner_id=caller.owner_id, route=kind, key=key, fingerprint=fingerprint(request)
            )
            if known is not None:
                return Submitted(_stored_view(session, known, caller=caller), already_submitted=True)
        parameters, jobs_ahead = _resolve_and_check(session, request, retrieval, caller=caller, settings=settings)
        if request.dry_run:
            return DryRunView(kind=kind, parameters=parameters)
        queue_limits.refuse_when_full(session, caller.owner_id, settings.queue)
        max_timeout_s = settings.jobs.timeout_s
        job = jobs.insert(
            session,
            owner_id=caller.owner_id,
            kind=kind,
            lane=request.lane,
            parameters=parameters,
            metadata=request.metadata,
            timeout_s=min(request.timeout_s or max_timeout_s, max_timeout_s),
            expires_in_s=request.expires_in_s,
            webhook=request.webhook,
            limits=settings.limits,
        )
        reference_images.add(session, pictures, job_id=job.id)
        view = _finish_submit(session, job, jobs_ahead=jobs_ahead, route=kind, caller=caller, key=key)
    return _dispatch(view)


def _finish_submit(
    session: Session, job: Job, *, jobs_ahead: int, route: str, caller: Caller, key: str | None
) -> JobView:
    """Return the view of the new job, and store it as the answer for the idempotency key."""
    view = views.new_job(session, job, jobs_ahead=jobs_ahead)
    if key is not None:
        idempotency.store_answer(session, view.model_dump(mode="json"), owner_id=caller.owner_id, route=route, key=key)
    return view


def _find_answer(
    session: Session, kind: JobKind, request: GenerateRequest, *, caller: Caller, key: str | None
) -> Submitted | None:
    """Return the stored answer of an earlier request with this key."""
    if key is None or request.dry_run:
        return None
    known = idempotency.find_answer(
        session, owner_id=caller.owner_id, route=kind, key=key, fingerprint=fingerprint(request)
    )
    return None if known is None else Submitted(_stored_view(session, known, caller=caller), already_submitted=True)


def _stored_view(session: Session, answer: dict[str, Any], *, caller: Caller) -> JobView:
    """Return the stored answer; if another release wrote it in an unreadable form, the job as it is now."""
    bind_contextvars(job_id=answer["id"])
    try:
        return JobView.model_validate(answer, extra="ignore")
    except pydantic.ValidationError:
        return views.job(session, jobs.get(session, UUID(answer["id"]), owner_id=caller.owner_id))


def _dispatch(view: JobView) -> Submitted:
    """Request that the job is published. Call it after the commit: a worker must find the row.

    It works while the broker is unavailable, because the row is the outbox.
    """
    bind_contextvars(job_id=str(view.id))
    metrics.increment_counter(metrics.JOBS_SUBMITTED, labels={"kind": view.kind})
    dispatch_soon(view.model)
    publish_job_update(view.id)  # for pages that show the queue
    return Submitted(view)


def fingerprint(request: GenerateRequest) -> str:
    """Return a digest of the request with its defaults. Two ways to write the same request have the same digest."""
    return hashlib.sha256(orjson.dumps(request.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)).hexdigest()


def _resolve_and_check(
    session: Session, request: GenerateRequest, retrieval: Retrieval, *, caller: Caller, settings: Settings
) -> tuple[GenerationParameters, int]:
    """Resolve the request, and check that the collections and the pinned images exist.

    Returns the parameters and the queue position of the job.
    """
    model = request.model or settings.model.default_generator
    if isinstance(request, RagGenerateRequest) and request.plan is not None:
        plan = plans.redeem(session, request.plan, prompt=request.prompt, model=model, caller=caller)
        texts = [] if plan.concepts == [request.prompt] else plan.concepts
        concepts = [ResolvedConcept(text=text) for text in texts]
        retrieval = replace(
            retrieval,
            min_similarity=plan.min_similarity,
            where=plan.where,
            concepts=concepts,
            pinned=plan.references,
            planned_at=plan.made_at,
        )
    defaults = CollectionDefaults()
    if retrieval.searched:
        defaults = defaults_of(
            find_collection(session, retrieval.where.collection, caller=caller, field="body.filter.collection")
        )
        for number, concept in enumerate(retrieval.concepts):
            if concept.filter is not None:
                field = f"body.concepts.{number}.filter.collection"
                find_collection(session, concept.filter.collection, caller=caller, field=field)
    known = admission.read(session, model=model, lane=request.lane)
    parameters = resolve(
        request,
        retrieval,
        settings=settings,
        capabilities={} if known.capabilities is None else {model: known.capabilities},
        defaults=defaults,
        calibration=known.calibration,
    )
    if retrieval.mode is not Mode.NONE:
        _check_pinned_images(session, retrieval.pinned, caller=caller)
    return parameters, known.jobs_ahead


def resolve(
    request: GenerateRequest,
    retrieval: Retrieval,
    *,
    settings: Settings,
    capabilities: Mapping[str, Capabilities],
    defaults: CollectionDefaults,
    calibration: Calibration | None,
) -> GenerationParameters:
    """Resolve the defaults of the request. This does not check whether its collections and images exist.

    capabilities: by model, of those that a worker has loaded. defaults: those of the collection that the request names.
    calibration: of the active embedding space.

    Raises:
        ModelNotFoundError: no model of this name is configured.
        UnsupportedModeError: the model cannot work in the requested mode.
        UnsupportedSizeError: the model cannot draw the exact size.
        UnsupportedParameterError: the model does not support the scheduler, a LoRA or a parameter.
    """
    name = request.model or settings.model.default_generator
    generator = settings.model.generator(name)
    known = capabilities.get(name)
    of_model = resolve_defaults(generator.defaults, known)
    width, height = request.width or of_model.width, request.height or of_model.height
    _check_request(request, retrieval, generator, known, width=width, height=height)

    requested_k = retrieval.k
    if requested_k is None:
        default_k = defaults.k or settings.retrieval.default_k
        needed = sum(concept.k or 1 for concept in retrieval.concepts)
        requested_k = default_references(known, retrieval.mode, default=default_k, concepts=needed)
    gate = resolve_gate(
        calibration, retrieval.min_similarity, defaults.min_similarity, settings.retrieval.min_similarity
    )
    return GenerationParameters(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        model=name,
        seeds=seeds_from(request.seed, request.num_images),
        width=width,
        height=height,
        exact_size=request.exact_size,
        num_inference_steps=request.num_inference_steps or of_model.num_inference_steps,
        guidance_scale=_or_default(request.guidance_scale, of_model.guidance_scale),
        scheduler=request.scheduler or of_model.scheduler,
        loras=request.loras,
        format=request.format,
        quality=request.quality,
        mode=retrieval.mode,
        ip_adapter_scale=_or_default(retrieval.ip_adapter_scale, of_model.ip_adapter_scale),
        strength=_or_default(retrieval.strength, of_model.strength),
        k=min(requested_k, generator.max_references) if retrieval.searched else 0,
        concepts=list(retrieval.concepts),
        avoid=list(retrieval.avoid) if retrieval.searched else [],
        avoid_ids=list(retrieval.avoid_ids) if retrieval.searched else [],
        search_mode=defaults.mode or SearchMode.HYBRID,
        min_similarity=gate.min_similarity,
        max_gap=gate.max_gap,
        matched_min_similarity=gate.matched_min_similarity,
        filter=retrieval.where,
        references=list(retrieval.pinned),
        planned_at=retrieval.planned_at,
        reference_images=list(retrieval.pictures),
        preview_every=request.preview_every,
    )


def _or_default(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_request(
    request: GenerateRequest,
    retrieval: Retrieval,
    generator: GeneratorSettings,
    capabilities: Capabilities | None,
    *,
    width: int,
    height: int,
) -> None:
    """Refuse requests that the model cannot fulfil.

    Until a worker has published the model's capabilities, only the settings are checked. The job then fails later, with
    the same code.
    """
    named = len(retrieval.pinned) + len(retrieval.pictures)
    # The settings may have changed since the worker published the capabilities.
    most = min(generator.max_references, capabilities.max_references if capabilities else generator.max_references)
    if named > most:
        raise UnsupportedParameterError(
            f"This model takes at most {most} references, not {named}.",
            parameter="reference_images" if retrieval.pictures else "reference_ids",
            maximum=most,
        )
    unknown = sorted(set(request.loras) - set(generator.loras))
    if unknown:
        raise UnsupportedParameterError(
            f"This model has no LoRA {', '.join(unknown)}.", parameter="loras", choices=sorted(generator.loras)
        )
    if capabilities is None:
        return
    check_parameters(
        capabilities,
        mode=retrieval.mode,
        scheduler=request.scheduler,
        loras=request.loras,
        references=named,
        negative_prompt=request.negative_prompt,
    )
    drawable = drawable_size(capabilities, width, height)
    if request.exact_size and drawable != (width, height):
        raise UnsupportedSizeError(
            f"This model cannot draw {width} x {height}; the nearest size is {drawable[0]} x {drawable[1]}.",
            width=width,
            height=height,
            nearest={"width": drawable[0], "height": drawable[1]},
        )


def _check_pinned_images(session: Session, pinned: Sequence[PinnedReference], *, caller: Caller) -> None:
    if not pinned:
        return
    ids = [reference.image_id for reference in pinned]
    space = spaces.find_active(session)
    searchable = (
        images.filter_searchable(session, space, ids, principal=caller.principal) if space is not None else set()
    )
    missing = [str(image_id) for image_id in ids if image_id not in searchable]
    if missing:
        raise ReferenceUnavailableError(image_ids=missing)
