"""What browsers are told, and what they may not do to the service: headers, other origins, other names.

A client that is no browser needs none of it. A browser runs anybody's pages beside ours, and where keys are off
(locally, on loopback) it would let them act with every right. So there the service answers only to its own names, which
no page elsewhere can take (DNS rebinding), and refuses the changes that such a page asks for.
"""

import base64
import hashlib
import re
from functools import partial
from urllib.parse import urlsplit

from flask import Flask, Response, request
from flask_cors import CORS

from api_service.http.auth import READING, from_own_page
from api_service.http.headers import COMPONENTS
from shared.errors import AuthorizationError
from shared.settings import SecuritySettings, Settings

DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
"""Content-Security-Policy of what is no page."""
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


def register(app: Flask, settings: Settings) -> None:
    security = settings.security
    if security.cors_origins:
        CORS(
            app,
            resources="/api/*",
            origins=security.cors_origins,
            allow_headers=[
                "Authorization",
                "Content-Type",
                "Idempotency-Key",
                "If-None-Match",
                "Last-Event-ID",
                "Prefer",
            ],
            expose_headers=sorted(COMPONENTS),
            max_age=600,
        )
    if not security.require_api_keys:
        app.before_request(partial(_refuse_other_pages, security))
    app.after_request(_tell_browsers)


def _refuse_other_pages(security: SecuritySettings) -> None:
    # A browser always names the host; `request.host` is empty when it is no name at all.
    if "Host" in request.headers and urlsplit(f"//{request.host}").hostname not in security.trusted_hosts:
        raise AuthorizationError("The service does not answer to that name: `security.trusted_hosts`.")
    origin = request.headers.get("Origin")
    if origin is None or request.method in READING or origin in security.cors_origins:
        return
    if not from_own_page(request):
        raise AuthorizationError("A page of another origin may not do that here.")


def _tell_browsers(response: Response) -> Response:
    headers = response.headers
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers["X-Frame-Options"] = "DENY"
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    if response.mimetype != "text/html":
        headers.setdefault("Content-Security-Policy", DATA_POLICY)
        return response
    headers["Cross-Origin-Opener-Policy"] = "same-origin"
    # With `no-referrer` a browser would not say either that a form came from a page of ours.
    headers["Referrer-Policy"] = "same-origin"
    # Swagger UI brings a script and styles of its own inside the page.
    own = _swagger_sources(response) if request.blueprint == "swagger" else ""
    headers.setdefault("Content-Security-Policy", PAGE_POLICY + own)
    return response


def _swagger_sources(response: Response) -> str:
    digests = (hashlib.sha256(script).digest() for script in INLINE_SCRIPT.findall(response.get_data()))
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return f"; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'"
