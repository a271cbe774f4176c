"""Authentication by API key, from the header or from Studio's cookie, and the scope that each operation needs."""

from dataclasses import dataclass
from functools import lru_cache
from uuid import UUID

from flask import Request

from shared.db import keys, owners
from shared.db.collections import Principal
from shared.db.session import session_scope
from shared.errors import AuthenticationError, AuthorizationError, DatabaseConnectionError
from shared.settings import get_settings

BLUEPRINT_SCOPES = {
    "generation": "generate",
    "bulks": "generate",
    "jobs": "generate",
    "outputs": "generate",
    "reference_images": "generate",
    "search": "search",
    "webhooks": "generate",
    "admin": "admin",
    "studio_bulks": "generate",
    "studio_gallery": "generate",
    "studio_generation": "generate",
    "studio_queue": "generate",
    "studio_search": "search",
}
"""Scope that the operations of a blueprint need. In `CORPUS_BLUEPRINTS` it depends on the method; others need none."""
CORPUS_BLUEPRINTS = ("images", "collections", "studio_corpus", "studio_collections")
READ_METHODS = ("GET", "HEAD", "OPTIONS")
FOREIGN_ORIGIN = "Pages of another origin must not do this."


@dataclass(frozen=True)
class Caller:
    """The owner and the scopes of the key with which a request was sent."""

    owner_id: UUID
    scopes: frozenset[str]
    key_id: UUID | None = None
    """`None` when API keys are off."""
    key_prefix: str | None = None
    """First characters of the key, for the audit."""
    collection_ids: frozenset[UUID] | None = None
    """The collections to which the key is limited; `None`: it may use all that its owner may use."""

    @property
    def principal(self) -> Principal:
        """The caller as the database's rules of access know it."""
        return Principal(self.owner_id, self.collection_ids)


def authenticate(request: Request) -> Caller:
    """Return the owner of the request's API key. When keys are off, it is the default owner with all scopes.

    Raises:
        AuthenticationError: the request has no key, or the key is invalid, expired or revoked.
        AuthorizationError: the key lacks the scope that the operation needs. Or a browser sent the key as a cookie,
            with a change that does not come from a page of this service.
        DatabaseConnectionError: the database does not answer.
    """
    security = get_settings().security
    if not security.require_api_keys:
        return Caller(_owner_id(security.default_owner), frozenset(keys.SCOPES))
    secret = _sent_key(request)
    with session_scope(single_read=True) as session:
        key = keys.find_valid(session, secret)
    if key is None:
        raise AuthenticationError
    needed = scope_of(request)
    if needed is not None and needed not in key.scopes:
        raise AuthorizationError(f"This API key lacks the scope {needed!r}.", scope=needed)
    return Caller(key.owner_id, key.scopes, key.id, key.prefix, key.collection_ids)


def may_see_details(request: Request) -> bool:
    """Whether the caller of a probe is an operator. Others learn which component is down, but not why."""
    if not get_settings().security.require_api_keys:
        return True
    try:
        return "admin" in authenticate(request).scopes
    except (AuthenticationError, AuthorizationError, DatabaseConnectionError):
        return False


def statistics_owner(caller: Caller) -> UUID | None:
    """The owner whose statistics the caller may see; None: those of the whole service."""
    return None if "admin" in caller.scopes else caller.owner_id


def scope_of(request: Request) -> str | None:
    """Return the scope that the request's operation needs; `None`: any valid key will do."""
    if request.blueprint in CORPUS_BLUEPRINTS:
        return "search" if request.method in READ_METHODS else "corpus:write"
    return BLUEPRINT_SCOPES.get(request.blueprint or "")


def cookie_name(request: Request) -> str:
    """Name of the cookie with the API key of a person who has signed in to Studio.

    Under TLS its prefix keeps other hosts from setting it. `__Host-` needs the path `/`:
    https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Set-Cookie#cookie_prefixes.
    """
    if not over_tls(request):
        return "afterimage_key"
    return "__Secure-afterimage_key" if request.root_path else "__Host-afterimage_key"


def over_tls(request: Request) -> bool:
    """Whether the client uses TLS, to this process or to a proxy that sets `X-Forwarded-Proto`.

    A client that forges the header only changes its own cookie.
    """
    nearest = request.headers.get("X-Forwarded-Proto", "").partition(",")[0].strip().lower()
    return request.is_secure or nearest == "https"


def from_own_page(request: Request) -> bool:
    """Whether a page of this service sent the request, by the `Origin` that browsers send with every change."""
    scheme, _, host = request.headers.get("Origin", "").partition("://")
    return host == request.host and scheme in (("https",) if over_tls(request) else ("http", "https"))


def _sent_key(request: Request) -> str:
    kind, _, secret = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer" and secret:
        return secret.strip()
    cookie = request.cookies.get(cookie_name(request))
    if kind or not cookie:
        raise AuthenticationError
    if request.method not in READ_METHODS and not from_own_page(request):
        raise AuthorizationError(FOREIGN_ORIGIN)
    return cookie


@lru_cache(maxsize=8)
def _owner_id(name: str) -> UUID:
    # Cached as long as the process runs: an owner's id never changes, and owners are disabled but not deleted.
    with session_scope() as session:
        return owners.ensure(session, name)
