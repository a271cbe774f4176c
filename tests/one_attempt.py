"""Writes of one attempt. The product makes them for several attempts at a time."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from shared.db import attempts
from shared.db.attempts import Claim, ClaimedJob, Failure, Resolution, StoredOutput, Success
from shared.errors import BaseAppException


def claim(session: Session, job_id: UUID, *, worker: str, lease_s: float) -> tuple[Claim, ClaimedJob] | None:
    return attempts.claim_all(session, [job_id], worker=worker, lease_s=lease_s).get(job_id)


def record_resolution(
    session: Session, claim: Claim, resolution: dict[str, Any], *, safety: dict[str, Any] | None = None
) -> bool:
    return bool(attempts.record_resolutions(session, [Resolution(claim, resolution, safety)]))


def finish(session: Session, claim: Claim, outputs: Sequence[StoredOutput], *, timings: dict[str, float]) -> bool:
    return bool(attempts.finish_all(session, [Success(claim, outputs, timings)]))


def fail(session: Session, claim: Claim, error: BaseAppException) -> bool:
    return bool(attempts.fail_all(session, [Failure(claim, error)]))
