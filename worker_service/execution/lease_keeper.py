"""Renews the leases of jobs and images that this process works on, in a thread that no model call can delay.

A lease in the database gives a job or an image to one worker for some seconds. When the worker dies, its leases
expire, and the reconciler makes the jobs and images available again.
"""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Self, TypeVar

from shared.errors import DatabaseError

logger = logging.getLogger(__name__)

Lease = TypeVar("Lease")


class LeaseKeeper(ABC, Generic[Lease]):
    """Renews the held leases; a context manager around the life of the process.

    The thread uses its own database connection.
    """

    def __init__(self, *, poll_s: float) -> None:
        self._poll_s = poll_s
        self._held: set[Lease] = set()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Wait until no lease is held; False when some still are after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._held, timeout_s)

    @abstractmethod
    def _renew_due(self, held: Sequence[Lease]) -> None:
        """Renew the leases that are due. Called every `poll_s` seconds.

        Raises:
            DatabaseError: no lease was renewed; the next call tries again.
        """

    def _add(self, leases: Sequence[Lease]) -> None:
        with self._changed:
            self._held.update(leases)

    def _remove(self, leases: Sequence[Lease]) -> None:
        with self._changed:
            self._held.difference_update(leases)
            self._changed.notify_all()

    def _snapshot(self) -> list[Lease]:
        with self._changed:
            return list(self._held)

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            held = self._snapshot()
            try:
                self._renew_due(held)
            except DatabaseError as error:
                # The work goes on: once the database is back, each write fails if the lease was lost.
                logger.warning("lease_renewal_failed", extra={"cause": error.code, "leases": len(held)})
