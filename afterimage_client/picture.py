"""A generated image with its bytes and its record."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.contracts.jobs import OutputView

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Picture:
    """A generated image.

    Attributes:
        data: the bytes of the file, in the format `output.format`.
        output: its record, with seed, references and provenance.
    """

    output: OutputView
    data: bytes = field(repr=False)

    def save(self, target: Path | str) -> Path:
        """Write the file, and return its path. Missing folders are created."""
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.data)
        return path

    def image(self) -> "Image.Image":
        """Return it as an image of Pillow, which must be installed."""
        from PIL import Image

        return Image.open(io.BytesIO(self.data))

    def _repr_mimebundle_(self, **_: Any) -> dict[str, bytes]:
        """Show the image in a notebook."""
        return {f"image/{self.output.format}": self.data}
