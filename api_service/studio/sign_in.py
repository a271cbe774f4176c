"""Signing in with an API key, which the browser then sends by itself; and what every page needs."""

from flask import Response, request

from api_service.http.auth import cookie_name, from_own_page, over_tls
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
    _only_from_own_page()
    secret = request.form.get("key", "").strip()
    with session_scope() as session:
        key = keys.find_valid(session, secret)
    if key is None:
        refused = page("sign_in", active="", refused=True)
        refused.status_code = 401
        return refused
    response = to("studio_generation.create" if "generate" in key.scopes else "studio_corpus.memory")
    # Out of reach of scripts, never sent for a change by a page of another site, gone with the browser's session.
    response.set_cookie(cookie_name(request), secret, httponly=True, samesite="Lax", secure=over_tls(request))
    return response


@studio.post("/sign-out")
def sign_out() -> Response:
    _only_from_own_page()
    response = to("studio.sign_in")
    response.delete_cookie(cookie_name(request), httponly=True, samesite="Lax", secure=over_tls(request))
    response.headers["Clear-Site-Data"] = '"cache"'  # pictures are kept for long, as they never change
    return response


def _only_from_own_page() -> None:
    if not from_own_page(request):
        raise AuthorizationError("A page of another origin may not do that here.")
