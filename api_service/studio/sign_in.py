"""Signing in with an API key, which the browser then sends by itself; and what every page needs."""

from flask import Response, request

from api_service.caller import COOKIE, from_own_page
from api_service.studio.pages import page, pages, to
from shared.db import keys
from shared.db.session import session_scope
from shared.errors import AuthorizationError

studio = pages("studio")
studio.static_folder = "static"
studio.static_url_path = "/studio"


@studio.get("/sign-in")
def sign_in() -> Response:
    return page("sign_in", active="", refused=False)


@studio.post("/sign-in")
def check_key() -> Response:
    if not from_own_page(request):
        raise AuthorizationError("A page of another origin may not do that here.")
    secret = request.form.get("key", "").strip()
    with session_scope() as session:
        valid = secret and keys.find_valid(session, secret) is not None
    if not valid:
        refused = page("sign_in", active="", refused=True)
        refused.status_code = 401
        return refused
    response = to("studio_generation.create")
    # Out of reach of scripts, never sent for pages of other sites, gone with the browser's session.
    response.set_cookie(COOKIE, secret, httponly=True, samesite="Strict", secure=_over_tls())
    return response


@studio.post("/sign-out")
def sign_out() -> Response:
    response = to("studio.sign_in")
    response.delete_cookie(COOKIE, httponly=True, samesite="Strict", secure=_over_tls())
    return response


def _over_tls() -> bool:
    """Whoever makes this up makes it up of his own cookie."""
    return request.is_secure or request.headers.get("X-Forwarded-Proto") == "https"
