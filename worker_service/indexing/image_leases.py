"""Leases of the corpus images that this process embeds.

An embed worker claims images for `lease_s` seconds, and a thread renews the leases while it works. When the process
dies, the leases expire and the reconciler makes the images available to other workers. If their model work had
started, that counts as a crash of each image; after `jobs.max_crashes` crashes an image is `failed`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from shared.db import images
from shared.db.images import ImageClaim
from shared.db.session import session_scope
from shared.errors import DatabaseConnectionError
from shared.settings import JobSettings
from worker_service.execution.lease_keeper import LeaseKeeper


class ImageLeases(LeaseKeeper[ImageClaim]):
    """Renews the leases of an embed worker's images, each for the length of a `holding` block."""

    def __init__(self, settings: JobSettings) -> None:
        super().__init__(poll_s=settings.heartbeat_s)
        self.lease_s = settings.lease_s
        self._to_return: set[ImageClaim] = set()

    @contextmanager
    def holding(self, claims: Sequence[ImageClaim]) -> Iterator[None]:
        """Renew the leases of these images for the length of the block.

        When a lost database connection ends the block, the images are handed back as soon as the database responds.
        Without that, their expired leases would count as crashes. After any other error, the leases expire.
        """
        self._add(claims)
        try:
            yield
        except DatabaseConnectionError:
            with self._changed:
                self._to_return.update(claims)
            raise
        finally:
            self._remove(claims)

    def hand_back(self) -> int:
        """Make every held image available to other workers at once; how many images were still owned.

        Raises:
            DatabaseError: the database failed, and the leases expire instead.
        """
        with session_scope() as session:
            return images.hand_back(session, self._snapshot())

    def _renew_due(self, held: Sequence[ImageClaim]) -> None:
        with self._changed:
            returned = list(self._to_return)
        if not held and not returned:
            return
        with session_scope() as session:
            images.renew(session, held, lease_s=self.lease_s)
        if returned:
            # In another transaction: each of the two statements locks its rows in order, but not both together.
            with session_scope() as session:
                images.hand_back(session, returned)
        with self._changed:
            self._to_return.difference_update(returned)
