"""Who is asking, and whether they may."""

from dataclasses import dataclass
from functools import lru_cache
from uuid import UUID

from flask import Request

from shared.db import keys, owners
from shared.db.session import session_scope
from shared.errors import AuthenticationError, AuthorizationError, DatabaseConnectionError
from shared.settings import get_settings

SCOPES = {
    "generation": "generate",
    "bulks": "generate",
    "jobs": "generate",
    "outputs": "generate",
    "search": "search",
    "webhooks": "generate",
    "admin": "admin",
    "studio_generation": "generate",
    "studio_search": "search",
}
"""What an API key must allow for the operations of a resource; images depend on the method, the rest needs any key."""
IMAGES = ("images", "studio_corpus")
READING = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Caller:
    """On whose behalf a request acts, and what it may do."""

    owner_id: UUID
    scopes: frozenset[str]
    key_id: UUID | None = None
    """None where keys are off."""


def authenticated(request: Request) -> Caller:
    """The owner of the request's API key, or, where keys are off, the default owner with every right.

    Raises:
        AuthenticationError: no key, or one that is not valid (any more).
        AuthorizationError: the key lacks the scope that the operation needs, or a browser sent it along with a change
            that is not known to come from a page of ours.
        DatabaseConnectionError
    """
    security = get_settings().security
    if not security.require_api_keys:
        return Caller(_owner_id(security.default_owner), frozenset(keys.SCOPES))
    secret = _secret(request)
    with session_scope() as session:
        key = keys.find_valid(session, secret)
    if key is None:
        raise AuthenticationError
    needed = scope_of(request)
    if needed is not None and needed not in key.scopes:
        raise AuthorizationError(f"This API key lacks the scope {needed!r}.", scope=needed)
    return Caller(key.owner_id, frozenset(key.scopes), key.id)


def may_see_details(request: Request) -> bool:
    """Whether an operator asks a probe: others learn which part is away, not why."""
    if not get_settings().security.require_api_keys:
        return True
    try:
        return "admin" in authenticated(request).scopes
    except (AuthenticationError, AuthorizationError, DatabaseConnectionError):
        return False


def scope_of(request: Request) -> str | None:
    """The scope that the request's operation needs; None for any valid key."""
    if request.blueprint in IMAGES:
        return "search" if request.method in READING else "corpus:write"
    return SCOPES.get(request.blueprint or "")


def cookie_name(request: Request) -> str:
    """Of the cookie that holds the API key of a person who has signed in. Under TLS no other host may set it:
    https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Set-Cookie#cookie_prefixes."""
    return "__Host-afterimage_key" if over_tls(request) else "afterimage_key"


def over_tls(request: Request) -> bool:
    """Whether the browser is at the end of a TLS connection, to this process or to a proxy that says so.

    Whoever makes it up makes it up of his own cookie.
    """
    nearest = request.headers.get("X-Forwarded-Proto", "").partition(",")[0].strip().lower()
    return request.is_secure or nearest == "https"


def from_own_page(request: Request) -> bool:
    """Whether a browser says that a page of this service sent the request; it says so with every change."""
    scheme, _, host = request.headers.get("Origin", "").partition("://")
    return host == request.host and scheme in (("https",) if over_tls(request) else ("http", "https"))


def _secret(request: Request) -> str:
    kind, _, secret = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer" and secret:
        return secret.strip()
    cookie = request.cookies.get(cookie_name(request))
    if kind or not cookie:
        raise AuthenticationError
    if request.method not in READING and not from_own_page(request):
        raise AuthorizationError("A page of another origin may not do that here.")
    return cookie


@lru_cache(maxsize=8)
def _owner_id(name: str) -> UUID:
    # Remembered for the life of the process: an owner's id never changes and owners are disabled, not deleted.
    with session_scope() as session:
        return owners.ensure(session, name)
