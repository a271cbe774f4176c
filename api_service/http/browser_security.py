"""Protection against other pages in a user's browser: security headers, CORS, and checks of host name and origin.

Programs do not need it. When API keys are off (locally, on loopback), any page in the same browser could call the API
with all rights. The service then answers only to its own host names, which prevents DNS rebinding. It also refuses
changes that pages of other origins request.
"""

import base64
import hashlib
import re
from functools import partial
from urllib.parse import urlsplit

from flask import Flask, Response, request
from flask_cors import CORS

from api_service.http.auth import FOREIGN_ORIGIN, READ_METHODS, from_own_page
from api_service.http.headers import HEADER_COMPONENTS
from shared.errors import AuthorizationError
from shared.settings import SecuritySettings, Settings

DATA_CSP = "default-src 'none'; frame-ancestors 'none'"
"""Content-Security-Policy of responses that are not HTML pages."""
PAGE_CSP = (
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
                "If-Range",
                "Last-Event-ID",
                "Prefer",
                "Range",
            ],
            expose_headers=sorted(HEADER_COMPONENTS),
            max_age=600,
        )
    if not security.require_api_keys:
        app.before_request(partial(_check_host_and_origin, security))
    app.after_request(_set_security_headers)


def _check_host_and_origin(security: SecuritySettings) -> None:
    # A browser always sends `Host`. `request.host` is empty when the header is not a valid host name.
    if "Host" in request.headers and urlsplit(f"//{request.host}").hostname not in security.trusted_hosts:
        raise AuthorizationError("The service does not answer to this host name. See `security.trusted_hosts`.")
    origin = request.headers.get("Origin")
    if origin is None or request.method in READ_METHODS or origin in security.cors_origins:
        return
    if not from_own_page(request):
        raise AuthorizationError(FOREIGN_ORIGIN)


def _set_security_headers(response: Response) -> Response:
    headers = response.headers
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers["X-Frame-Options"] = "DENY"
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    if response.mimetype != "text/html":
        headers.setdefault("Content-Security-Policy", DATA_CSP)
        return response
    headers["Cross-Origin-Opener-Policy"] = "same-origin"
    # With `no-referrer`, browsers would send `Origin: null` with the forms of these pages.
    headers["Referrer-Policy"] = "same-origin"
    # Swagger UI's page has an inline script and inline styles.
    inline_sources = _swagger_sources(response) if request.blueprint == "swagger" else ""
    headers.setdefault("Content-Security-Policy", PAGE_CSP + inline_sources)
    return response


def _swagger_sources(response: Response) -> str:
    digests = (hashlib.sha256(script).digest() for script in INLINE_SCRIPT.findall(response.get_data()))
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return f"; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'"
