"""The corpus: upload, list, look, change, delete."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from afterimage_client import download
from afterimage_client.connection import Connection, parsed
from shared.contracts.images import ImagePatch, ImageState, ImageView, UploadFields, UploadResponse
from shared.contracts.jobs import OutputView

SLOWEST_FILE_S = 20.0
"""How long a service may take to decode one file, by default."""


@dataclass(frozen=True)
class ImageFile:
    """An image to send, as it is; the service decodes it."""

    name: str
    data: bytes

    @staticmethod
    def read(path: Path) -> "ImageFile":
        return ImageFile(path.name, path.read_bytes())


class Images:
    """`Afterimage.images`"""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def upload(self, files: Sequence[ImageFile], fields: UploadFields | None = None) -> UploadResponse:
        """Add images to the corpus; `fields` are said of each, and `fields.each` of single ones.

        All are kept or none, or with `on_invalid="skip"` all that are images: `files` of the answer tells. A file that
        the collection has already is answered with the image it has, so sending again is safe.

        Raises:
            InvalidRequestError: a file is no image that the service takes, and is not to be skipped; `context["index"]`
                says which.
        """
        usual_s = self._connection.http.timeout.read
        return parsed(
            UploadResponse,
            self._connection.send(
                "POST",
                "/upload",
                data=_form(fields or UploadFields()),
                files=[("file", (file.name, file.data)) for file in files],
                # They are decoded before the answer, one after the other, and behind those of others.
                timeout=self._connection.timeout(read_s=(usual_s or 0) + SLOWEST_FILE_S * len(files)),
            ),
        )

    def get(self, image_id: UUID) -> ImageView:
        return self._connection.get(ImageView, f"/images/{image_id}")

    def list(
        self,
        *,
        collection: str = "shared",
        state: ImageState | None = None,
        tag: str | None = None,
        source: str | None = None,
        licence: str | None = None,
        page_size: int = 100,
    ) -> Iterator[ImageView]:
        """The images of a collection, newest first."""
        query = {
            "collection": collection,
            "state": state,
            "tag": tag,
            "source": source,
            "licence": licence,
            "limit": page_size,
        }
        return self._connection.pages(ImageView, "/images", query)

    def change(self, image_id: UUID, patch: ImagePatch) -> ImageView:
        """Give an image new values for the fields that `patch` names."""
        body = patch.model_dump(mode="json", exclude_unset=True)
        return parsed(ImageView, self._connection.send("PATCH", f"/images/{image_id}", json=body))

    def delete(self, image_id: UUID) -> None:
        """Forget an image: from the answer on no search and no generation meets it."""
        self._connection.delete(f"/images/{image_id}")

    def generations(self, image_id: UUID, *, page_size: int = 100) -> Iterator[OutputView]:
        """Every output of yours that used this image, also after it was deleted."""
        return self._connection.pages(OutputView, f"/images/{image_id}/generations", {"limit": page_size})

    def content(self, image_id: UUID) -> bytes:
        """The file as the service keeps it, in memory: upright, sRGB, without metadata."""
        return self._connection.send("GET", f"/images/{image_id}/content").content

    def download(self, image: ImageView, target: Path) -> None:
        """Write the file as the service keeps it to `target`, there as a whole or not at all.

        Its `sha256` is of what was uploaded, so here only the length can be checked.
        """
        download.save(self._connection, f"/images/{image.id}/content", target, size_bytes=image.size_bytes)


def _form(fields: UploadFields) -> Mapping[str, Any]:
    given = fields.model_dump(mode="json", exclude_unset=True)
    for name in ("attributes", "each"):
        if name in given:
            given[name] = json.dumps(given[name])
    return {name: value for name, value in given.items() if value not in (None, [])}
