"""Heartbeats of workers and capabilities of models. The API learns both here, because it does not import torch."""

from datetime import timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.contracts.service import Capabilities
from shared.db.tables import ModelRecord, Worker

LIVE_S = 30
"""A worker whose last heartbeat is older than this does not count as live."""


def heartbeat(
    session: Session, worker_id: str, *, kind: str, model: str | None, state: str, space: str | None = None
) -> None:
    """Record that the worker is live, and delete workers without a heartbeat for a day.

    space: digest of the embedding space of its CLIP.
    """
    changing = {"state": state, "space": space, "heartbeat_at": func.now()}
    statement = upsert(Worker).values({"id": worker_id, "kind": kind, "model": model, **changing})
    session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=changing))
    session.execute(delete(Worker).where(Worker.heartbeat_at < func.now() - timedelta(days=1)))


def remove(session: Session, worker_id: str) -> None:
    """Remove a worker that stops."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def list_live(session: Session) -> list[Worker]:
    """Workers with a heartbeat in the last `LIVE_S` seconds."""
    statement = select(Worker).where(Worker.heartbeat_at > func.now() - timedelta(seconds=LIVE_S))
    return list(session.scalars(statement.order_by(Worker.kind, Worker.id)))


def list_of_space(session: Session, digest: str, *, kind: str | None = None) -> list[Worker]:
    """Live workers whose CLIP makes vectors of this space. kind: only workers of this kind."""
    return [each for each in list_live(session) if each.space == digest and kind in (None, each.kind)]


def list_served_models(session: Session, *, load_limit_s: float) -> set[str]:
    """Models with a live worker, or with a worker that started to load less than `load_limit_s` ago.

    A worker that loads sends no heartbeats.
    """
    live = Worker.heartbeat_at > func.now() - timedelta(seconds=LIVE_S)
    loading = (Worker.state == "loading") & (Worker.heartbeat_at > func.now() - timedelta(seconds=load_limit_s))
    return set(session.scalars(select(Worker.model).where(Worker.model.is_not(None), live | loading).distinct()))


def publish_capabilities(session: Session, model: str, capabilities: Capabilities) -> None:
    """Store the capabilities of a model that a worker has loaded."""
    values = {"capabilities": capabilities.model_dump(mode="json"), "updated_at": func.now()}
    statement = upsert(ModelRecord).values(name=model, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["name"], set_=values))


def list_capabilities(session: Session) -> dict[str, tuple[Capabilities, ModelRecord]]:
    """The capabilities of every generator that a worker has ever loaded, by model name."""
    return {
        record.name: (Capabilities.model_validate(record.capabilities, extra="ignore"), record)
        for record in session.scalars(select(ModelRecord))
    }
