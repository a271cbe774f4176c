"""Submitting work, without HTTP: what decides the result is resolved here, once, and kept with the job."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import orjson
import pydantic
from sqlalchemy.orm import Session

from api_service.http.auth import Caller
from api_service.services import images as corpus
from api_service.services import views
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
from shared.db.tables import Generation, GenerationReference, Job, ModelRecord
from shared.errors import (
    ModelNotFoundError,
    OriginalUnreadableError,
    ReferenceUnavailableError,
    UnsupportedParameterError,
    UnsupportedSizeError,
)
from shared.messaging.coalesce import feed_bell
from shared.settings import GeneratorSettings, Settings, get_settings
from shared.ssrf import check_url

REPLAY = "replay"
"""The route under which the idempotency keys of replays are kept."""


@dataclass(frozen=True)
class Submitted:
    """An accepted job. `replayed`: its key was known, and this is the answer of then."""

    view: JobView
    replayed: bool = False


def generation(request: GenerateRequest, *, caller: Caller, key: str | None = None) -> Submitted | DryRunView:
    """Queue images from a prompt alone.

    Raises:
        ModelNotFoundError, UnsupportedSizeError, UnsupportedParameterError: the model cannot do that.
        IdempotencyKeyReusedError: `key` came with another request in the last 24 hours.
        OwnerQueueFullError, QueueFullError, QuotaExceededError, DatabaseConnectionError
    """
    return _submit(JobKind.GENERATE, request, retrieval_of(request), caller=caller, key=key)


def rag_generation(request: RagGenerateRequest, *, caller: Caller, key: str | None = None) -> Submitted | DryRunView:
    """Queue images conditioned on what the corpus remembers, or on pinned references.

    Raises:
        As `generation`, and
        UnsupportedModeError: the model cannot condition in the mode asked for.
        ReferenceUnavailableError: a pinned image is not there, not the caller's, or not searchable yet.
        ValidationError: there is no such collection.
    """
    return _submit(JobKind.RAG_GENERATE, request, retrieval_of(request), caller=caller, key=key)


def retry(job_id: UUID, *, caller: Caller) -> JobView:
    """Queue a new job that does the same as one that ended without success.

    Raises:
        ResourceNotFoundError
        JobStateError: the job has not ended, or has succeeded.
        ReferenceUnavailableError, OwnerQueueFullError, QueueFullError, QuotaExceededError, DatabaseConnectionError
    """
    with session_scope() as session:
        old = jobs.get(session, job_id, owner_id=caller.owner_id)
        queue_limits.refuse_when_full(session, caller.owner_id, get_settings().queue)
        job = jobs.insert_retry(session, old)
        parameters = GenerationParameters.model_validate(old.parameters)
        _check_pinned(session, parameters.references, caller=caller)
        view = _accept(session, job, route="retry", caller=caller, key=None, settings=get_settings())
    return _announced(view).view


def replay(generation_id: UUID, *, caller: Caller, key: str | None = None) -> Submitted:
    """Queue a job that draws an output again, from its record, and compares the two.

    Raises:
        ResourceNotFoundError: there is no such output.
        ReferenceUnavailableError: an image that shaped it is gone.
        ModelNotFoundError: its model is not configured any more.
        OriginalUnreadableError: another release recorded it, with what this one does not know.
        IdempotencyKeyReusedError, OwnerQueueFullError, QueueFullError, QuotaExceededError, DatabaseConnectionError
    """
    settings = get_settings()
    with session_scope() as session:
        if key is not None:
            known = idempotency.begin(
                session, owner_id=caller.owner_id, route=REPLAY, key=key, fingerprint=str(generation_id)
            )
            if known is not None:
                return Submitted(JobView.model_validate(known), replayed=True)
        original = outputs.get(session, generation_id, owner_id=caller.owner_id)
        parameters = _as_recorded(original, outputs.references_of(session, [original.id]).get(original.id, []))
        if parameters.model not in settings.model.generators:
            raise ModelNotFoundError(model=parameters.model, models=sorted(settings.model.generators))
        _check_pinned(session, parameters.references, caller=caller)
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
        view = _accept(session, job, route=REPLAY, caller=caller, key=key, settings=settings)
    return _announced(view)


def _as_recorded(original: Generation, references: Sequence[GenerationReference]) -> GenerationParameters:
    """What it takes to draw one output again: its own seed, mode and references, and nothing that is looked for."""
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
    """The part of a request that is about references; None where the service decides."""

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
                return Submitted(JobView.model_validate(known), replayed=True)
        parameters = _resolved(session, request, retrieval, caller=caller, settings=settings)
        if request.dry_run:
            return DryRunView(kind=kind, parameters=parameters)
        queue_limits.refuse_when_full(session, caller.owner_id, settings.queue)
        longest_s = settings.jobs.timeout_s
        job = jobs.insert(
            session,
            owner_id=caller.owner_id,
            kind=kind,
            lane=request.lane,
            parameters=parameters,
            metadata=request.metadata,
            timeout_s=min(request.timeout_s or longest_s, longest_s),
            expires_in_s=request.expires_in_s,
            webhook=request.webhook,
        )
        view = _accept(session, job, route=kind, caller=caller, key=key, settings=settings)
    return _announced(view)


def _accept(session: Session, job: Job, *, route: str, caller: Caller, key: str | None, settings: Settings) -> JobView:
    """The answer to a submit, kept for its key; the last thing in the transaction that makes the job."""
    session.refresh(job)
    view = views.job(session, job)
    if key is not None:
        idempotency.remember(session, view.model_dump(mode="json"), owner_id=caller.owner_id, route=route, key=key)
    # Last, because the owner's other submits wait for the end of this transaction from here on.
    job.quota_day = quotas.reserve(session, caller.owner_id, job.images, settings.limits)
    return view


def _announced(view: JobView) -> Submitted:
    """After the commit: no worker may look for a row that is not there yet. A broker that is away fails nothing, the
    row is the outbox."""
    metrics.increment_counter("jobs_submitted_total", labels={"kind": view.kind})
    feed_bell(view.model).pull()
    return Submitted(view)


def fingerprint(request: GenerateRequest) -> str:
    """Equal for requests that mean the same, however they were written: it is taken after the defaults."""
    return hashlib.sha256(orjson.dumps(request.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)).hexdigest()


def _resolved(
    session: Session, request: GenerateRequest, retrieval: Retrieval, *, caller: Caller, settings: Settings
) -> GenerationParameters:
    """The request with nothing left open, and everything there that it names."""
    parameters = resolved(request, retrieval, settings=settings, capabilities=workers.capabilities(session))
    if retrieval.mode is not Mode.NONE:
        corpus.named(session, retrieval.where.collection, caller=caller, field="body.filter.collection")
        _check_pinned(session, retrieval.pinned, caller=caller)
    return parameters


def resolved(
    request: GenerateRequest,
    retrieval: Retrieval,
    *,
    settings: Settings,
    capabilities: Mapping[str, tuple[Capabilities, ModelRecord]],
) -> GenerationParameters:
    """The request with nothing left open. Whether the collection and the images it names exist is not asked here.

    Raises:
        ModelNotFoundError, UnsupportedModeError, UnsupportedSizeError, UnsupportedParameterError
    """
    name = request.model or settings.model.default_generator
    generator = settings.model.generators.get(name)
    if generator is None:
        raise ModelNotFoundError(model=name, models=sorted(settings.model.generators))
    defaults = generator.defaults
    width, height = request.width or defaults.width, request.height or defaults.height
    known = capabilities.get(name)
    _check(request, retrieval, generator, known[0] if known else None, width=width, height=height)

    wanted = retrieval.k if retrieval.k is not None else settings.retrieval.default_k
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
        guidance_scale=_first(request.guidance_scale, defaults.guidance_scale),
        scheduler=request.scheduler or defaults.scheduler,
        loras=request.loras,
        format=request.format,
        quality=request.quality,
        mode=retrieval.mode,
        ip_adapter_scale=_first(retrieval.ip_adapter_scale, defaults.ip_adapter_scale),
        strength=_first(retrieval.strength, defaults.strength),
        k=min(wanted, generator.max_references) if searched else 0,
        min_similarity=_first(retrieval.min_similarity, settings.retrieval.min_similarity),
        filter=retrieval.where,
        references=list(retrieval.pinned),
        preview_every=request.preview_every,
    )


def _first(asked: float | None, default: float) -> float:
    return default if asked is None else asked


def _check(
    request: GenerateRequest,
    retrieval: Retrieval,
    generator: GeneratorSettings,
    capabilities: Capabilities | None,
    *,
    width: int,
    height: int,
) -> None:
    """Refuse what the model cannot do. Before a worker has told, only what the settings tell is checked: the job
    then fails later, with the same code."""
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
    drawn = drawable_size(capabilities, width, height)
    if request.exact_size and drawn != (width, height):
        raise UnsupportedSizeError(
            f"This model draws {drawn[0]} x {drawn[1]} instead of {width} x {height}.",
            width=width,
            height=height,
            nearest={"width": drawn[0], "height": drawn[1]},
        )


def _check_pinned(session: Session, pinned: Sequence[PinnedReference], *, caller: Caller) -> None:
    if not pinned:
        return
    ids = [reference.image_id for reference in pinned]
    space = spaces.find_active(session)
    there = images.searchable(session, space, ids, owner_id=caller.owner_id) if space is not None else set()
    missing = [str(image_id) for image_id in ids if image_id not in there]
    if missing:
        raise ReferenceUnavailableError(image_ids=missing)
