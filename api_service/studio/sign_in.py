"""Studio's pages to sign in with an API key and to sign out, and its static files."""

from typing import Any

from flask import Response, request

from api_service.http.auth import FOREIGN_ORIGIN, cookie_name, from_own_page, over_tls
from api_service.studio.pages import page_blueprint, redirect_to, render_page
from shared.db import keys
from shared.db.session import session_scope
from shared.errors import AuthorizationError

studio = page_blueprint("studio")
studio.static_folder = "static"
studio.static_url_path = "/studio"


@studio.get("/sign-in")
def sign_in() -> Response:
    return render_page("sign_in", active="", refused=False)


@studio.post("/sign-in")
def check_key() -> Response:
    _check_origin()
    secret = request.form.get("key", "").strip()
    with session_scope() as session:
        key = keys.find_valid(session, secret)
    if key is None:
        page = render_page("sign_in", active="", refused=True)
        page.status_code = 401
        return page
    response = redirect_to("studio_generation.create" if "generate" in key.scopes else "studio_corpus.corpus")
    # Scripts cannot read it, pages of other sites cannot send it with a change, and it ends with the browser session.
    response.set_cookie(cookie_name(request), secret, **_cookie_options())
    return response


@studio.post("/sign-out")
def sign_out() -> Response:
    _check_origin()
    response = redirect_to("studio.sign_in")
    response.delete_cookie(cookie_name(request), **_cookie_options())
    response.headers["Clear-Site-Data"] = '"cache", "storage"'  # images, and recent prompts
    return response


def _cookie_options() -> dict[str, Any]:
    # Other services on the same host do not get the key.
    path = request.root_path or "/"
    return {"path": path, "httponly": True, "samesite": "Lax", "secure": over_tls(request)}


def _check_origin() -> None:
    if not from_own_page(request):
        raise AuthorizationError(FOREIGN_ORIGIN)
