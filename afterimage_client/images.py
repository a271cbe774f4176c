"""Images of the corpus: upload, list, read, change, delete."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from afterimage_client import download
from afterimage_client.connection import Connection, Id, id_of, parse_response, sent_tags
from shared.contracts.images import (
    Cascade,
    ImageDelete,
    ImagePatch,
    ImageState,
    ImageView,
    UploadFields,
    UploadResponse,
    WithdrawalView,
)
from shared.contracts.jobs import OutputView


@dataclass(frozen=True)
class ImageFile:
    """The bytes of an image to upload; the service decodes them."""

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
        """Add images to the corpus.

        If one file is invalid, no image is stored. With `on_invalid="skip"` invalid files are skipped, and `files` of
        the answer has the result of each. For a file that the collection already has, the answer names the existing
        image, so an upload may be repeated.

        fields: description of all images; `fields.each` describes single ones.

        Raises:
            InvalidRequestError: the service does not accept a file and must not skip it; `context["index"]` is its
                index.
        """
        return parse_response(
            UploadResponse,
            self._connection.send(
                "POST",
                "/upload",
                data=_form(fields or UploadFields()),
                files=[("file", (file.name, file.data)) for file in files],
                timeout=self._connection.decode_timeout(files=len(files)),
            ),
        )

    def get(self, image: Id | ImageView) -> ImageView:
        return self._connection.get(ImageView, f"/images/{_id(image)}")

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
        """Yield the images of a collection, newest first."""
        query = {
            "collection": collection,
            "state": state,
            "tag": tag,
            "source": source,
            "licence": licence,
            "limit": page_size,
        }
        return self._connection.iterate_pages(ImageView, "/images", query)

    def change(self, image: Id | ImageView, patch: ImagePatch) -> ImageView:
        """Change the fields of an image that `patch` sets."""
        body = patch.model_dump(mode="json", exclude_unset=True)
        return parse_response(ImageView, self._connection.send("PATCH", f"/images/{_id(image)}", json=body))

    def delete(self, image: Id | ImageView) -> None:
        """Delete an image. After the answer, no search finds it and no generation uses it."""
        self._connection.delete(f"/images/{_id(image)}")

    def withdraw(self, image: Id | ImageView, *, reason: str | None = None, dry_run: bool = False) -> WithdrawalView:
        """Delete an image, and withdraw all outputs that drew from it. This cannot be undone.

        reason: shown to the owners of the outputs. dry_run: only count them.

        Raises:
            PermissionDeniedError: outputs or images of other owners are among them, and the API key lacks the scope
                `admin`.
        """
        query = ImageDelete(cascade=Cascade.WITHDRAW, reason=reason, dry_run=dry_run)
        params = query.model_dump(mode="json", exclude_defaults=True)
        # A second withdrawal would find no image. So an attempt whose answer was lost is not repeated.
        response = self._connection.send("DELETE", f"/images/{_id(image)}", params=params, idempotent=dry_run)
        return parse_response(WithdrawalView, response)

    def generations(self, image: Id | ImageView, *, page_size: int = 100) -> Iterator[OutputView]:
        """Yield your outputs that used this image, also after its deletion."""
        return self._connection.iterate_pages(OutputView, f"/images/{_id(image)}/generations", {"limit": page_size})

    def content(self, image: Id | ImageView) -> bytes:
        """Return the stored file as bytes: upright, sRGB, without metadata."""
        return self._connection.send("GET", f"/images/{_id(image)}/content").content

    def download(self, image: ImageView, target: Path) -> None:
        """Download the stored file to `target`, which appears only when it is complete.

        The image's `sha256` is that of the uploaded file, so only the size is checked here.
        """
        download.download_file(self._connection, f"/images/{_id(image)}/content", target, size_bytes=image.size_bytes)


def _id(image: Id | ImageView) -> UUID:
    return id_of(image, ImageView)


def _form(fields: UploadFields) -> Mapping[str, Any]:
    given = fields.model_dump(mode="json", exclude_unset=True)
    for name in ("attributes", "each"):
        if name in given:
            given[name] = json.dumps(given[name])
    if "tags" in given:
        given["tags"] = sent_tags(given["tags"])
    return {name: value for name, value in given.items() if value not in (None, [])}
