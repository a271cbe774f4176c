"""Which workers live, and what the generators can do: how the torch-free API knows."""

from datetime import timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.contracts.service import Capabilities
from shared.db.tables import ModelRecord, Worker

LIVE_S = 30
"""A worker that has not been heard of for this long is not counted."""


def heartbeat(session: Session, worker_id: str, *, kind: str, model: str | None, state: str) -> None:
    values = {"id": worker_id, "kind": kind, "model": model, "state": state, "heartbeat_at": func.now()}
    statement = upsert(Worker).values(values)
    session.execute(
        statement.on_conflict_do_update(index_elements=["id"], set_={"state": state, "heartbeat_at": func.now()})
    )
    session.execute(delete(Worker).where(Worker.heartbeat_at < func.now() - timedelta(days=1)))


def gone(session: Session, worker_id: str) -> None:
    session.execute(delete(Worker).where(Worker.id == worker_id))


def live(session: Session) -> list[Worker]:
    statement = select(Worker).where(Worker.heartbeat_at > func.now() - timedelta(seconds=LIVE_S))
    return list(session.scalars(statement.order_by(Worker.kind, Worker.id)))


def publish_capabilities(session: Session, model: str, capabilities: Capabilities) -> None:
    values = {"capabilities": capabilities.model_dump(mode="json"), "updated_at": func.now()}
    statement = upsert(ModelRecord).values(name=model, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["name"], set_=values))


def capabilities(session: Session) -> dict[str, tuple[Capabilities, ModelRecord]]:
    """What each generator that was ever loaded can do."""
    return {
        record.name: (Capabilities.model_validate(record.capabilities), record)
        for record in session.scalars(select(ModelRecord))
    }
