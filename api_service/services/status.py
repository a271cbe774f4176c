"""Counts, capabilities and usage, for people and dashboards."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from api_service.http.auth import Caller
from shared.cache import cache_result, get_cache_manager
from shared.capabilities import resolve_defaults
from shared.contracts.calibration import Calibration, GateOrigin, RelevanceView
from shared.contracts.jobs import JobState
from shared.contracts.safety import ConceptView, PolicyView, SafetyAction
from shared.contracts.service import EmbeddingSpaceView, JobWindow, ModelsResponse, ModelView, StatsView, UsageView
from shared.db import calibrations, queue_limits, queue_position, quotas, space_backlog, spaces, workers
from shared.db.session import session_scope
from shared.db.space_backlog import Progress
from shared.db.spaces import Space
from shared.db.tables import Collection, Image, Job, Output, Worker
from shared.metrics import recent_operations
from shared.pools import pool_statistics
from shared.request_stats import WINDOWS_MIN, request_stats
from shared.retrieval import resolve_gate
from shared.settings import ConceptSettings, get_settings

PERCENTILES = [0.5, 0.95, 0.99]
PROGRESS_TTL_S = 5.0
"""How long the counts of an embedding space are cached: they take about a second for a million images."""
WARNING_TTL_S = 60.0


def models() -> ModelsResponse:
    """Return the generators with the capabilities that their workers published, the content policy, and the gate."""
    settings, concepts = get_settings().model, get_settings().safety.concepts
    with session_scope() as session:
        known = workers.list_capabilities(session)
        live = workers.list_live(session)
        space = spaces.find_active(session)
        calibration = None if space is None else calibrations.find(session, space)
    return ModelsResponse(
        models=[
            ModelView(
                name=name,
                default=name == settings.default_generator,
                ready_workers=sum(worker.model == name and worker.state == "ready" for worker in live),
                capabilities=known[name][0] if name in known else None,
                defaults=resolve_defaults(generator.defaults, known[name][0] if name in known else None).model_dump(),
                updated_at=known[name][1].updated_at if name in known else None,
            )
            for name, generator in settings.generators.items()
        ],
        policy=PolicyView(concepts=[_concept_view(each) for each in concepts]) if concepts else None,
        relevance=None if space is None else _relevance_view(space, calibration),
    )


def _relevance_view(space: Space, calibration: Calibration | None) -> RelevanceView:
    """Return the relevance gate of searches whose request and collection set no threshold."""
    setting = get_settings().retrieval.min_similarity
    gate = resolve_gate(calibration, setting)
    measured_at = None if calibration is None else calibration.measured_at
    origin = GateOrigin.DEFAULT if calibration is None else GateOrigin.CALIBRATION
    return RelevanceView(
        min_similarity=gate.min_similarity,
        max_gap=gate.max_gap,
        matched_min_similarity=gate.matched_min_similarity,
        origin=origin if setting is None else GateOrigin.SETTING,
        calibration=calibration,
        warning=_calibration_warning(space, measured_at) if setting is None else None,
    )


@cache_result(key_prefix="calibration-warning", ttl=WARNING_TTL_S)
def _calibration_warning(space: Space, _measured_at: datetime | None) -> str | None:
    """Look for a reason against the calibration of this time, in a transaction of its own: it counts the collection."""
    with session_scope() as session:
        return calibrations.warning_about(session, space)


def _concept_view(concept: ConceptSettings) -> ConceptView:
    return ConceptView(
        name=concept.name,
        prompt=SafetyAction(concept.prompt.action) if concept.prompt else None,
        output=SafetyAction(concept.output.action) if concept.output else None,
    )


def stats(*, owner_id: UUID | None) -> StatsView:
    """Return counts of rows, and the state of workers, cache, pools and recent requests.

    owner_id: count only the rows of this owner, and leave out what is for operators. None: the whole service.
    """
    everything = owner_id is None
    own_collections = select(Collection.id).where(Collection.owner_id == owner_id, Collection.deleted_at.is_(None))
    own_images = [] if everything else [Image.collection_id.in_(own_collections)]
    own_jobs = [] if everything else [Job.owner_id == owner_id]
    own_outputs = [] if everything else [Output.owner_id == owner_id]
    queued = select(Job.model, func.count()).where(Job.state == JobState.QUEUED, *own_jobs).group_by(Job.model)
    with session_scope() as session:
        known_spaces, live = spaces.list_all(session), workers.list_live(session)
    embedding_spaces = _list_spaces(known_spaces, live, with_progress=everything)
    with session_scope() as session:
        return StatsView(
            images=_count_by_name(session, select(Image.state, func.count()).where(*own_images).group_by(Image.state)),
            jobs=_count_by_name(session, select(Job.state, func.count()).where(*own_jobs).group_by(Job.state)),
            generations=session.scalar(select(func.count()).select_from(Output).where(*own_outputs)) or 0,
            queues=_count_by_name(session, queued),
            workers=[
                {
                    # The name of the host follows the "@".
                    "id": worker.id if everything else worker.id.partition("@")[0],
                    "kind": worker.kind,
                    "model": worker.model,
                    "state": worker.state,
                    "started_at": worker.started_at,
                }
                for worker in live
            ],
            cache=get_cache_manager().stats() if everything else {},
            pools=pool_statistics() if everything else {},
            embedding_spaces=embedding_spaces,
            recent_requests=request_stats().read() if everything else [],
            recent_jobs=[_jobs_ended(session, *own_jobs, seconds=minutes * 60) for minutes in WINDOWS_MIN],
            operations=recent_operations() if everything else {},
        )


def _list_spaces(
    known: Sequence[tuple[Space, bool]], live: Sequence[Worker], *, with_progress: bool
) -> list[EmbeddingSpaceView]:
    """Describe the embedding spaces. live: all live workers."""
    views = []
    for space, active in known:
        view = EmbeddingSpaceView(digest=space.digest, model=space.model, dim=space.dim, active=active)
        if with_progress:
            progress = _space_progress(space)
            states = Counter(f"{each.kind} {each.state}" for each in live if each.space == space.digest)
            view = view.model_copy(
                update={
                    "vectors": progress.vectors,
                    "missing": progress.missing,
                    "failed": progress.failed,
                    "rate_per_s": progress.rate_per_s,
                    "remaining_s": progress.remaining_s,
                    "workers": dict(states),
                }
            )
        views.append(view)
    return views


@cache_result(key_prefix="space-progress", ttl=PROGRESS_TTL_S)
def _space_progress(space: Space) -> Progress:
    """Count a space, in a transaction of its own. Pages that show it every few seconds share one count."""
    with session_scope() as session:
        return space_backlog.get_progress(session, space)


def places_before_model(*, owner_id: UUID | None = None) -> dict[UUID, int]:
    """Return the jobs that a worker has taken and whose images the model does not draw yet.

    Each has the number of such jobs of its model that are drawn earlier. owner_id: only jobs of this owner.
    """
    with session_scope() as session:
        waiting = queue_position.jobs_waiting_for_model(session)
    ahead: Counter[str] = Counter()
    places = {}
    for job in waiting:
        if owner_id in (None, job.owner_id):
            places[job.id] = ahead[job.model]
        ahead[job.model] += 1
    return places


def own_usage(*, caller: Caller) -> UsageView:
    """Return the images that the caller's owner has used today, and its queued jobs."""
    settings = get_settings()
    max_queued = settings.queue.max_queued_per_owner
    with session_scope() as session:
        today = quotas.get_today(session, caller.owner_id, settings.limits)
        queued = queue_limits.count_queued(session, caller.owner_id, at_most=max_queued)
    return UsageView(
        day=today.day,
        images=today.images,
        daily_images=today.quota,
        resets_at=today.ends_at,
        queued_jobs=queued,
        max_queued_jobs=max_queued,
    )


def _jobs_ended(session: Session, *where: ColumnElement[bool], seconds: float) -> JobWindow:
    """Return statistics of the jobs that ended in the last `seconds`. All replicas read them from the same table."""
    waited = func.extract("epoch", Job.started_at - Job.created_at)
    took = func.extract("epoch", Job.finished_at - Job.created_at)
    recent = Job.finished_at > func.now() - timedelta(seconds=seconds)
    ended = _count_by_name(session, select(Job.state, func.count()).where(recent, *where).group_by(Job.state))
    percentiles = session.execute(
        select(
            func.percentile_cont(PERCENTILES).within_group(waited), func.percentile_cont(PERCENTILES).within_group(took)
        ).where(recent, *where)
    ).one()
    wait, total = ([None if s is None else round(float(s), 3) for s in each or [None] * 3] for each in percentiles)
    return JobWindow(
        seconds=seconds,
        ended=ended,
        rate_per_s=round(sum(ended.values()) / seconds, 3),
        wait_p50_s=wait[0],
        wait_p95_s=wait[1],
        wait_p99_s=wait[2],
        total_p50_s=total[0],
        total_p95_s=total[1],
        total_p99_s=total[2],
    )


def _count_by_name(session: Session, statement: Any) -> dict[str, int]:
    return {str(name): count for name, count in session.execute(statement)}
