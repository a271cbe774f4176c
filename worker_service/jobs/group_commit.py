"""Group commit: changes that attempts of this process make at the same time share one transaction.

Its statements change any number of jobs at once, so that a job costs a fraction of a transaction. Every attempt still
gets its own verdict. A group leaves out each job that another transaction has locked, and each change that it could not
make. These changes are then applied alone, each in the thread of its attempt, where it may wait or raise an error. The
same happens to all changes of a group whose transaction failed.
"""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from shared import tracing
from shared.db import attempts
from shared.db.attempts import Claim, ClaimedJob, Failure, Resolution, Success
from shared.db.session import session_scope
from shared.singleton import process_singleton
from shared.tracing import TraceContext

Change = Resolution | Failure | Success
"""A change by an attempt that owns its job."""
WRITES: dict[type[Change], Callable[..., set[Claim]]] = {
    Resolution: attempts.record_resolutions,
    Failure: attempts.fail_all,
    Success: attempts.finish_all,
}
Claimed = tuple[Claim, ClaimedJob]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Waiting:
    """A change, or the id of a job to claim, from its submission to its verdict."""

    change: Change | UUID
    trace: TraceContext | None = field(default_factory=tracing.current)
    taken: bool = False
    """A thread has taken it into its group."""
    verdict: Any = None
    """The verdict of the group; None when the change has to be applied alone."""


class GroupCommit:
    """Applies the changes of many threads, one group at a time. The changes that come meanwhile form the next group.

    There is no thread of its own: the first thread that waits for its turn applies the group.
    """

    def __init__(self, worker: str, lease_s: float) -> None:
        """worker: id of this process. lease_s: seconds for which a claim holds."""
        self._worker = worker
        self._lease_s = lease_s
        self._waiting: list[_Waiting] = []
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def claim(self, job_id: UUID) -> Claimed | None:
        """Claim a queued job; None when it cannot be claimed: see `attempts.claim_all`.

        Raises:
            DatabaseError: the database failed.
        """
        claimed: Claimed | None = self._commit(job_id)
        return claimed

    def write(self, change: Change) -> bool:
        """Make a change; False when its attempt no longer owns the job.

        Raises:
            ReferenceDeletedError: see `attempts.finish_all`.
            DatabaseError: the database failed.
        """
        return bool(self._commit(change))

    def _commit(self, change: Change | UUID) -> Any:
        mine = _Waiting(change)
        with self._lock:
            self._waiting.append(mine)
        with self._turn:
            if not mine.taken:
                with self._lock:
                    group, self._waiting = self._waiting, []
                self._commit_group(group)
        if mine.verdict is None:
            with session_scope() as session:
                mine.verdict = self._apply(session, [change], wait=True).get(change)
        return mine.verdict

    def _commit_group(self, group: Sequence[_Waiting]) -> None:
        """Apply the changes and commit. An error is not raised: each change, applied alone, then gets its own."""
        for each in group:
            each.taken = True
        traces = ((each.trace, {"change": type(each.change).__name__}) for each in group)
        try:
            with tracing.shared_span("commit", {"changes": len(group)}, traces), session_scope() as session:
                verdicts = self._apply(session, [each.change for each in group], wait=False)
        except Exception as error:
            logger.warning("group_split", extra={"size": len(group), "cause": type(error).__name__})
            return
        for each in group:
            # A message that was delivered twice claims its job once.
            each.verdict = verdicts.pop(each.change, None)

    def _apply(self, session: Session, changes: Collection[Change | UUID], *, wait: bool) -> dict[Change | UUID, Any]:
        """Apply the changes; return the verdicts of those that it could make."""
        job_ids = [change for change in changes if isinstance(change, UUID)]
        made: dict[Any, Any] = {}
        if job_ids:
            made |= attempts.claim_all(session, job_ids, worker=self._worker, lease_s=self._lease_s, wait=wait)
        for kind, write in WRITES.items():
            of_kind = [change for change in changes if isinstance(change, kind)]
            if of_kind:
                claims = write(session, of_kind, wait=wait)
                made |= {change: True for change in of_kind if change.claim in claims}
        return made


@process_singleton
def get_group_commit(worker: str, lease_s: float) -> GroupCommit:
    """The one of this process."""
    return GroupCommit(worker, lease_s)
