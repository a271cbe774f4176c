"""The images that this process embeds: a side thread renews their leases, so that no model call starves them."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from shared.db import images
from shared.db.images import ImageClaim
from shared.db.session import session_scope
from shared.errors import DatabaseConnectionError, DatabaseError
from shared.settings import JobSettings

logger = logging.getLogger(__name__)


class ImageLeases:
    """Renews what is held; a context manager around the life of the process."""

    def __init__(self, settings: JobSettings) -> None:
        self.lease_s = settings.lease_s
        self._heartbeat_s = settings.heartbeat_s
        self._held: set[ImageClaim] = set()
        self._to_return: set[ImageClaim] = set()
        self._released = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="image-leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def holding(self, claims: Sequence[ImageClaim]) -> Iterator[None]:
        """Keep these images ours for the length of the block.

        When the database ends the block by being away, they are handed back as soon as it answers: that is no crash.
        After any other failure their leases run out.
        """
        with self._released:
            self._held.update(claims)
        try:
            yield
        except DatabaseConnectionError:
            with self._released:
                self._to_return.update(claims)
            raise
        finally:
            with self._released:
                self._held.difference_update(claims)
                self._released.notify_all()

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Wait until no image is held; False when some still are after `timeout_s`."""
        with self._released:
            return self._released.wait_for(lambda: not self._held, timeout_s)

    def hand_back(self) -> int:
        """Let others claim every held image at once; how many were still ours."""
        with self._released:
            held = list(self._held)
        with session_scope() as session:
            return images.hand_back(session, held)

    def _work(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            with self._released:
                held, returned = list(self._held), list(self._to_return)
            if not held and not returned:
                continue
            try:
                with session_scope() as session:
                    images.renew(session, held, lease_s=self.lease_s)
                    images.hand_back(session, returned)
            except DatabaseError as error:
                # The work goes on: when the database is back, the fence tells whether it still counts.
                logger.warning("lease_renewal_failed", extra={"cause": error.code, "images": len(held)})
            else:
                with self._released:
                    self._to_return.difference_update(returned)
