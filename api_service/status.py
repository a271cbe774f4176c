"""Counts and capabilities, for people and dashboards."""

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.cache import get_cache_manager
from shared.contracts.jobs import JobState
from shared.contracts.service import ModelsResponse, ModelView, StatsView
from shared.db import spaces, workers
from shared.db.models import Generation, Image, Job
from shared.db.session import session_scope
from shared.metrics import recent_operations
from shared.pools import pool_statistics
from shared.settings import get_settings


def models() -> ModelsResponse:
    """The configured generators, with what their workers have told."""
    settings = get_settings().model
    with session_scope() as session:
        known = workers.capabilities(session)
        live = workers.live(session)
    return ModelsResponse(
        models=[
            ModelView(
                name=name,
                default=name == settings.default_generator,
                ready_workers=sum(worker.model == name and worker.state == "ready" for worker in live),
                capabilities=known[name][0] if name in known else None,
                defaults=generator.defaults.model_dump(),
                updated_at=known[name][1].updated_at if name in known else None,
            )
            for name, generator in settings.generators.items()
        ]
    )


def stats() -> StatsView:
    with session_scope() as session:
        return StatsView(
            images=_counted(session, select(Image.state, func.count()).group_by(Image.state)),
            jobs=_counted(session, select(Job.state, func.count()).group_by(Job.state)),
            generations=session.scalar(select(func.count()).select_from(Generation)) or 0,
            queues=_counted(
                session, select(Job.model, func.count()).where(Job.state == JobState.QUEUED).group_by(Job.model)
            ),
            workers=[
                {
                    "id": worker.id,
                    "kind": worker.kind,
                    "model": worker.model,
                    "state": worker.state,
                    "started_at": worker.started_at,
                }
                for worker in workers.live(session)
            ],
            cache=get_cache_manager().stats(),
            pools=pool_statistics(),
            embedding_spaces=[
                {"digest": space.digest, "model": space.model, "dim": space.dim, "active": active, "vectors": vectors}
                for space, active, vectors in spaces.listed(session)
            ],
            operations=recent_operations(),
        )


def _counted(session: Session, statement: Any) -> dict[str, int]:
    return {str(name): count for name, count in session.execute(statement)}
