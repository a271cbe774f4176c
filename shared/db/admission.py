"""The facts of the database on which the answer to a submit depends, read in one statement."""

from dataclasses import dataclass

from sqlalchemy import Integer, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from shared.contracts.calibration import Calibration
from shared.contracts.jobs import Lane
from shared.contracts.service import Capabilities
from shared.db import calibrations, queue_position


@dataclass(frozen=True)
class Admission:
    """The facts that a submit needs.

    capabilities: of the model; None until a worker has published them. calibration: of the active embedding space.
    jobs_ahead: the queue position of a job that is inserted now.
    """

    capabilities: Capabilities | None
    calibration: Calibration | None
    jobs_ahead: int


READ = (
    text(
        f"""
        select (select capabilities from models where name = :model) as capabilities, space.digest, space.calibration,
            ({queue_position.COUNT_AHEAD}) as counted
        from (select) as one_row left join embedding_spaces space on space.active
        """
    )
    .bindparams(*queue_position.RANGE_BINDS)
    .columns(capabilities=JSONB, digest=Text, calibration=JSONB, counted=Integer)
)
"""It has one row, also before the first worker has registered an embedding space."""


def read(session: Session, *, model: str, lane: Lane) -> Admission:
    """Read the facts for one more job of `model` in `lane`."""
    values, before = queue_position.range_ahead(session, model, queue_position.start_of_lane(lane.rank + 1))
    row = session.execute(READ, values).one()
    return Admission(
        capabilities=None
        if row.capabilities is None
        else Capabilities.model_validate(row.capabilities, extra="ignore"),
        calibration=None if row.digest is None else calibrations.of_space(row.digest, row.calibration),
        jobs_ahead=row.counted + before,
    )
