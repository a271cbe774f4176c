"""Outputs: the images that jobs generated."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from uuid import UUID, uuid4

from afterimage_client import download
from afterimage_client.connection import Connection, Id, id_of, parse_response
from shared.contracts.bulks import BulkOutput
from shared.contracts.generation import Mode
from shared.contracts.images import ImageView
from shared.contracts.jobs import JobView, OutputView
from shared.contracts.outputs import OutputPatch, RememberRequest


class Outputs:
    """`Afterimage.outputs`"""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, output: Id | OutputView | BulkOutput) -> OutputView:
        return self._connection.get(OutputView, f"/generations/{_id(output)}")

    def list(
        self,
        *,
        words: str | None = None,
        model: str | None = None,
        mode: Mode | None = None,
        favourite: bool | None = None,
        reference_id: UUID | None = None,
        job_id: UUID | None = None,
        bulk_id: UUID | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        page_size: int = 100,
    ) -> Iterator[OutputView]:
        """Yield your outputs, newest first.

        Args:
            words: the prompt has each of these words.
            reference_id: they used this image of the corpus.
            favourite: `True`: only favourites; `False`: only the others.
            created_after, created_before: with a time zone.
        """
        query = {
            "words": words,
            "model": model,
            "mode": mode,
            "favourite": favourite,
            "reference_id": reference_id and str(reference_id),
            "job_id": job_id and str(job_id),
            "bulk_id": bulk_id and str(bulk_id),
            "created_after": created_after and created_after.isoformat(),
            "created_before": created_before and created_before.isoformat(),
            "limit": page_size,
        }
        return self._connection.iterate_pages(OutputView, "/generations", query)

    def change(self, output: Id | OutputView | BulkOutput, patch: OutputPatch) -> OutputView:
        """Change the fields of an output that `patch` sets: whether it is a favourite."""
        body = patch.model_dump(mode="json", exclude_unset=True)
        return parse_response(OutputView, self._connection.send("PATCH", f"/generations/{_id(output)}", json=body))

    def content(self, output: Id | OutputView | BulkOutput) -> bytes:
        """Return the file as bytes; if an object names the output, its digest is checked.

        Raises:
            NotFoundError: the output was deleted.
            CorruptDownloadError: the bytes were wrong in every try.
        """
        path = f"/generations/{_id(output)}/content"
        sha256 = output.sha256 if isinstance(output, OutputView | BulkOutput) else None
        return download.download_bytes(self._connection, path, sha256=sha256)

    def download(self, output: OutputView | BulkOutput, target: Path) -> None:
        """Download the file to `target`, which appears only when it is complete and its digest is correct.

        Raises:
            NotFoundError: the output was deleted.
            CorruptDownloadError: the bytes were wrong in every try.
        """
        path = f"/generations/{_id(output)}/content"
        download.download_file(self._connection, path, target, sha256=output.sha256, size_bytes=output.size_bytes)

    def replay(self, output: Id | OutputView | BulkOutput, *, idempotency_key: str | None = None) -> JobView:
        """Queue a job that generates the output again from its record. The `replay` of its output is the comparison.

        idempotency_key: as in `Jobs.submit`.

        Raises:
            NotFoundError: the output was deleted.
            InvalidRequestError: an image that it used, or its model, does not exist any more.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        return self._connection.post(JobView, f"/generations/{_id(output)}/replay", headers=headers)

    def remember(
        self,
        output: Id | OutputView | BulkOutput,
        request: RememberRequest | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> ImageView:
        """Add the output to the corpus. If the collection already has its file, the answer is the existing image.

        request: collection, caption and tags of the image; by default the collection `shared` without a description.
        idempotency_key: as in `Jobs.submit`.

        Raises:
            NotFoundError: the output was deleted.
            PermissionDeniedError: the API key lacks the scope `corpus:write`.
        """
        body = (request or RememberRequest()).model_dump(mode="json", exclude_unset=True)
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        timeout = self._connection.decode_timeout(files=1)
        path = f"/generations/{_id(output)}/remember"
        return self._connection.post(ImageView, path, json=body, headers=headers, timeout=timeout)

    def delete(self, output: Id | OutputView | BulkOutput) -> None:
        """Delete one output, but not its job."""
        self._connection.delete(f"/generations/{_id(output)}")


def _id(output: Id | OutputView | BulkOutput) -> UUID:
    return id_of(output, OutputView, BulkOutput)
