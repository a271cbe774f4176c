"""An API process of another release, whose encoder writes other bytes: `python -m tests.other_encoder`.

The settings name its port.
"""

import io
import sys
from dataclasses import replace
from typing import Any

from api_service import __main__ as server
from api_service import app as app_module
from api_service.openapi.document import DocumentedApp
from shared.imaging import DecodedImage, UploadDecoder, open_image
from shared.settings import get_settings


class OtherEncoder(UploadDecoder):
    """The decoder of another release: it encodes to other bytes."""

    def decode(self, data: bytes, **options: Any) -> DecodedImage:
        decoded = super().decode(data, **options)
        return replace(decoded, data=_encoded(decoded.data, "PNG"), thumbnail=_encoded(decoded.thumbnail, "WEBP"))


def _encoded(data: bytes, kind: str) -> bytes:
    file = io.BytesIO()
    options = {"compress_level": 0} if kind == "PNG" else {"lossless": True, "exact": True, "quality": 1}
    open_image(data).save(file, kind, **options)
    return file.getvalue()


def served_app() -> DocumentedApp:
    app = app_module.served_app()
    app.extensions["decoder"] = OtherEncoder(get_settings().api)
    return app


if __name__ == "__main__":
    vars(server)["APP_FACTORY"] = "tests.other_encoder:served_app"
    sys.exit(server.main())
