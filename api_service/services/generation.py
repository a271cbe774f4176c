"""Use cases that submit jobs.

A request is resolved here, once: the job stores every value that does not depend on the corpus or the loaded model.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson
import pydantic
from sqlalchemy.orm import Session

from api_service.http.auth import Caller
from api_service.services import views
from api_service.services.images import find_collection
from shared import metrics
from shared.capabilities import check_parameters, drawable_size
from shared.contracts.generation import (
    DryRunView,
    GenerateRequest,
    GenerationParameters,
    Mode,
    PinnedReference,
    RagGenerateRequest,
    seeds_from,
)
from shared.contracts.jobs import JobKind, JobView, Lane
from shared.contracts.search import ImageFilter
from shared.contracts.service import Capabilities
from shared.db import idempotency, images, jobs, outputs, queue_limits, quotas, spaces, workers
from shared.db.session import session_scope
from shared.db.tables import Job, ModelRecord, Output, OutputReference
from shared.errors import (
    OriginalUnreadableError,
    ReferenceUnavailableError,
    UnsupportedParameterError,
    UnsupportedSizeError,
)
from shared.messaging.coalesce import dispatch_soon
from shared.settings import GeneratorSettings, Settings, get_settings
from shared.ssrf import check_url

REPLAY_ROUTE = "replay"
"""Name under which the idempotency keys of replays are stored."""


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


def rag_generate(request: RagGenerateRequest, *, caller: Caller, key: str | None = None) -> Submitted | DryRunView:
    """Queue a job that generates images conditioned on the nearest corpus images, or on pinned references.

    Raises:
        Exception: all errors of `generate`.
        UnsupportedModeError: the model cannot work in the requested mode.
        ReferenceUnavailableError: a pinned image does not exist, is not visible to the caller, or is not searchable.
        ValidationError: no collection has the requested name.
    """
    return _submit(JobKind.RAG_GENERATE, request, retrieval_of(request), caller=caller, key=key)


def retry(job_id: UUID, *, caller: Caller) -> JobView:
    """Queue a new job that repeats one that ended without success.

    Raises:
        ResourceNotFoundError: the caller has no job with this id.
        JobStateError: the job has not ended, or has succeeded.
        JobUnreadableError: another release accepted the job, in a form that this release cannot read.
        ModelNotFoundError: the model of the job is not configured any more.
        ReferenceUnavailableError: a pinned reference does not exist any more.
        OwnerQueueFullError, QueueFullError, QuotaExceededError, DatabaseConnectionError: as `generate`.
    """
    settings = get_settings()
    with session_scope() as session:
        old = jobs.get(session, job_id, owner_id=caller.owner_id)
        queue_limits.refuse_when_full(session, caller.owner_id, settings.queue)
        job = jobs.insert_retry(session, old)
        settings.model.generator(job.model)  # raises when the model is not configured any more
        parameters = GenerationParameters.model_validate(job.parameters)
        _check_pinned_images(session, parameters.references, caller=caller)
        view = _finish_submit(session, job, route="retry", caller=caller, key=None, settings=settings)
    return _dispatch(view).view


def replay(generation_id: UUID, *, caller: Caller, key: str | None = None) -> Submitted:
    """Queue a job that draws an output again from its record, and compares the two.

    Raises:
        ResourceNotFoundError: the caller has no output with this id.
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
                return Submitted(_stored_view(session, known, caller=caller), already_submitted=True)
        original = outputs.get(session, generation_id, owner_id=caller.owner_id)
        parameters = _recorded_parameters(
            original, outputs.list_references(session, [original.id]).get(original.id, [])
        )
        settings.model.generator(parameters.model)  # raises when the model is not configured any more
        _check_pinned_images(session, parameters.references, caller=caller)
        queue_limits.refuse_when_full(session, caller.owner_id, settings.queue)
        job = jobs.insert(
            session,
            owner_id=caller.owner_id,
            kind=JobKind.RAG_GENERATE if parameters.references else JobKind.GENERATE,
            lane=Lane.NORMAL,
            parameters=parameters,
            metadata={},
            timeout_s=settings.jobs.timeout_s,
            replay_of=original.id,
        )
        view = _finish_submit(session, job, route=REPLAY_ROUTE, caller=caller, key=key, settings=settings)
    return _dispatch(view)


def _recorded_parameters(original: Output, references: Sequence[OutputReference]) -> GenerationParameters:
    """Return the parameters that draw one output again: its own seed, mode and references, without a search."""
    try:
        return GenerationParameters.model_validate(
            {
                **original.provenance["parameters"],
                "seeds": [original.seed],
                "mode": original.provenance["mode"],
                "k": 0,
                "references": [{"image_id": each.image_id, "weight": each.weight} for each in references],
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
    pinned: Sequence[PinnedReference] = ()
    ip_adapter_scale: float | None = None
    strength: float | None = None


def retrieval_of(request: GenerateRequest) -> Retrieval:
    if not isinstance(request, RagGenerateRequest):
        return Retrieval(mode=Mode.NONE)
    return Retrieval(
        mode=request.mode,
        k=request.similar_examples_count,
        min_similarity=request.min_similarity,
        where=request.filter,
        pinned=request.pinned,
        ip_adapter_scale=request.ip_adapter_scale,
        strength=request.strength,
    )


def _submit(
    kind: JobKind, request: GenerateRequest, retrieval: Retrieval, *, caller: Caller, key: str | None
) -> Submitted | DryRunView:
    settings = get_settings()
    with session_scope() as session:
        if request.webhook is not None:
            check_url(request.webhook.url, settings.webhooks)
        if key is not None and not request.dry_run:
            known = idempotency.begin(
                session, owner_id=caller.owner_id, route=kind, key=key, fingerprint=fingerprint(request)
            )
            if known is not None:
                return Submitted(_stored_view(session, known, caller=caller), already_submitted=True)
        parameters = _resolve_and_check(session, request, retrieval, caller=caller, settings=settings)
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
        )
        view = _finish_submit(session, job, route=kind, caller=caller, key=key, settings=settings)
    return _dispatch(view)


def _finish_submit(
    session: Session, job: Job, *, route: str, caller: Caller, key: str | None, settings: Settings
) -> JobView:
    """Store the answer for the idempotency key and reserve the quota. Call it last in the transaction of the job."""
    session.refresh(job)
    view = views.job(session, job)
    if key is not None:
        idempotency.store_answer(session, view.model_dump(mode="json"), owner_id=caller.owner_id, route=route, key=key)
    # Last, because from here on the owner's other submits wait for the end of this transaction.
    job.quota_day = quotas.reserve(session, caller.owner_id, job.images, settings.limits)
    return view


def _stored_view(session: Session, answer: dict[str, Any], *, caller: Caller) -> JobView:
    """Return the stored answer; if another release wrote it in an unreadable form, the job as it is now."""
    try:
        return JobView.model_validate(answer, extra="ignore")
    except pydantic.ValidationError:
        return views.job(session, jobs.get(session, UUID(answer["id"]), owner_id=caller.owner_id))


def _dispatch(view: JobView) -> Submitted:
    """Request that the job is published. Call it after the commit: a worker must find the row.

    It works while the broker is unavailable, because the row is the outbox.
    """
    metrics.increment_counter(metrics.JOBS_SUBMITTED, labels={"kind": view.kind})
    dispatch_soon(view.model)
    return Submitted(view)


def fingerprint(request: GenerateRequest) -> str:
    """Return a digest of the request with its defaults. Two ways to write the same request have the same digest."""
    return hashlib.sha256(orjson.dumps(request.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)).hexdigest()


def _resolve_and_check(
    session: Session, request: GenerateRequest, retrieval: Retrieval, *, caller: Caller, settings: Settings
) -> GenerationParameters:
    """Resolve the request, and check that the collection and the pinned images exist."""
    parameters = resolve(request, retrieval, settings=settings, capabilities=workers.list_capabilities(session))
    if retrieval.mode is not Mode.NONE:
        find_collection(session, retrieval.where.collection, caller=caller, field="body.filter.collection")
        _check_pinned_images(session, retrieval.pinned, caller=caller)
    return parameters


def resolve(
    request: GenerateRequest,
    retrieval: Retrieval,
    *,
    settings: Settings,
    capabilities: Mapping[str, tuple[Capabilities, ModelRecord]],
) -> GenerationParameters:
    """Resolve the defaults of the request. This does not check whether its collection and images exist.

    Raises:
        ModelNotFoundError: no model of this name is configured.
        UnsupportedModeError: the model cannot work in the requested mode.
        UnsupportedSizeError: the model cannot draw the exact size.
        UnsupportedParameterError: the model does not support the scheduler, a LoRA or a parameter.
    """
    name = request.model or settings.model.default_generator
    generator = settings.model.generator(name)
    defaults = generator.defaults
    width, height = request.width or defaults.width, request.height or defaults.height
    known = capabilities.get(name)
    _check_request(request, retrieval, generator, known[0] if known else None, width=width, height=height)

    requested_k = retrieval.k if retrieval.k is not None else settings.retrieval.default_k
    searched = retrieval.mode is not Mode.NONE and not retrieval.pinned
    return GenerationParameters(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        model=name,
        seeds=seeds_from(request.seed, request.num_images),
        width=width,
        height=height,
        exact_size=request.exact_size,
        num_inference_steps=request.num_inference_steps or defaults.num_inference_steps,
        guidance_scale=_or_default(request.guidance_scale, defaults.guidance_scale),
        scheduler=request.scheduler or defaults.scheduler,
        loras=request.loras,
        format=request.format,
        quality=request.quality,
        mode=retrieval.mode,
        ip_adapter_scale=_or_default(retrieval.ip_adapter_scale, defaults.ip_adapter_scale),
        strength=_or_default(retrieval.strength, defaults.strength),
        k=min(requested_k, generator.max_references) if searched else 0,
        min_similarity=_or_default(retrieval.min_similarity, settings.retrieval.min_similarity),
        filter=retrieval.where,
        references=list(retrieval.pinned),
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
    if len(retrieval.pinned) > generator.max_references:
        raise UnsupportedParameterError(
            f"This model takes at most {generator.max_references} references, not {len(retrieval.pinned)}.",
            parameter="reference_ids",
            maximum=generator.max_references,
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
        references=len(retrieval.pinned),
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
    searchable = images.filter_searchable(session, space, ids, owner_id=caller.owner_id) if space is not None else set()
    missing = [str(image_id) for image_id in ids if image_id not in searchable]
    if missing:
        raise ReferenceUnavailableError(image_ids=missing)
