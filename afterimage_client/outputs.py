"""What jobs generated."""

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

from afterimage_client import download
from afterimage_client.connection import Connection
from shared.contracts.bulks import BulkOutput
from shared.contracts.jobs import JobView, OutputView


class Outputs:
    """`Afterimage.outputs`"""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, output_id: UUID) -> OutputView:
        return self._connection.get(OutputView, f"/generations/{output_id}")

    def list(self, *, reference_id: UUID | None = None, page_size: int = 100) -> Iterator[OutputView]:
        """Your outputs, newest first; of one corpus image, those that used it."""
        query = {"reference_id": reference_id and str(reference_id), "limit": page_size}
        return self._connection.pages(OutputView, "/generations", query)

    def content(self, output: OutputView | BulkOutput) -> bytes:
        """The file, in memory."""
        return self._connection.send("GET", f"/generations/{output.id}/content").content

    def download(self, output: OutputView | BulkOutput, target: Path) -> None:
        """Write the file to `target`: streamed, its digest checked, there as a whole or not at all.

        Raises:
            NotFoundError: the output was deleted.
            CorruptDownloadError: other bytes came than announced, on every try.
        """
        path = f"/generations/{output.id}/content"
        download.save(self._connection, path, target, sha256=output.sha256, size_bytes=output.size_bytes)

    def replay(self, output_id: UUID, *, idempotency_key: str | None = None) -> JobView:
        """Queue a job that draws the output again from its record; its own output tells how they compare.

        idempotency_key: as of `Jobs.submit`.

        Raises:
            NotFoundError: the output was deleted.
            InvalidRequestError: an image that shaped it, or its model, is gone.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        return self._connection.post(JobView, f"/generations/{output_id}/replay", headers=headers)

    def delete(self, output_id: UUID) -> None:
        """Delete one output; its job stays."""
        self._connection.delete(f"/generations/{output_id}")
