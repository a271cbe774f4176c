"""Collections of images: create, list, change, share, delete."""

from collections.abc import Iterator
from uuid import UUID

from afterimage_client.connection import Connection, Id, id_of, parse_response
from shared.contracts.collections import (
    CollectionCreate,
    CollectionDefaults,
    CollectionPatch,
    CollectionView,
    GrantedAccess,
    GrantRequest,
    GrantView,
)


class Collections:
    """`Afterimage.collections`"""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self, name: str, *, description: str | None = None, defaults: CollectionDefaults | None = None
    ) -> CollectionView:
        """Create a collection. An upload creates a missing one too, without a description.

        Raises:
            ConflictError: you have a collection of this name, or as many as the service allows.
        """
        request = CollectionCreate(
            name=name, description=description, defaults=CollectionDefaults() if defaults is None else defaults
        )
        # Not repeated when its answer is lost: the second try would meet the collection of the first.
        response = self._connection.send("POST", "/collections", json=request.model_dump(mode="json"), idempotent=False)
        return parse_response(CollectionView, response)

    def get(self, collection: Id | CollectionView) -> CollectionView:
        return self._connection.get(CollectionView, f"/collections/{_id(collection)}")

    def find(self, name: str) -> CollectionView | None:
        """Return the collection that a filter finds under this name, such as `products` or `team-b/products`."""
        return next(self._connection.iterate_pages(CollectionView, "/collections", {"name": name}), None)

    def list(self, *, page_size: int = 100) -> Iterator[CollectionView]:
        """Yield the collections that you may use, newest first."""
        return self._connection.iterate_pages(CollectionView, "/collections", {"limit": page_size})

    def change(self, collection: Id | CollectionView, patch: CollectionPatch) -> CollectionView:
        """Change the fields of a collection that `patch` sets."""
        body = patch.model_dump(mode="json", exclude_unset=True)
        response = self._connection.send("PATCH", f"/collections/{_id(collection)}", json=body)
        return parse_response(CollectionView, response)

    def delete(self, collection: Id | CollectionView) -> None:
        """Delete a collection with all its images. After the answer, no search finds them."""
        self._connection.delete(f"/collections/{_id(collection)}")

    def grants(self, collection: Id | CollectionView, *, page_size: int = 100) -> Iterator[GrantView]:
        """Yield the owners that have access to a collection, newest first."""
        return self._connection.iterate_pages(GrantView, f"/collections/{_id(collection)}/grants", {"limit": page_size})

    def share(
        self, collection: Id | CollectionView, owner: str, access: GrantedAccess = GrantedAccess.READ
    ) -> GrantView:
        """Share a collection with another owner, or change the access of that owner.

        Raises:
            NotFoundError: no owner has this name.
        """
        body = GrantRequest(access=access).model_dump(mode="json")
        response = self._connection.send("PUT", f"/collections/{_id(collection)}/grants/{owner}", json=body)
        return parse_response(GrantView, response)

    def unshare(self, collection: Id | CollectionView, owner: str) -> None:
        """Take the access of another owner away, at once."""
        self._connection.delete(f"/collections/{_id(collection)}/grants/{owner}")


def _id(collection: Id | CollectionView) -> UUID:
    return id_of(collection, CollectionView)
