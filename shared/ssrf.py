"""Protection against server-side request forgery (SSRF): checks URLs that users give before the service calls them.

A host's name is resolved once, and the connection goes to the checked address. The name is used only in `Host` and in
TLS. With a second look-up, the name could resolve to another address (DNS rebinding).
"""

import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

import httpx

from shared.errors import ForbiddenTargetError
from shared.settings import WebhookSettings

Address = IPv4Address | IPv6Address
GLOBAL_UNICAST = IPv6Network("2000::/3")
"""RFC 4291. Everything else is local, multicast, reserved, or embeds an IPv4 address (mapped, translated, NAT64)."""

SPECIAL = (
    IPv4Network("192.0.0.0/24"),  # IETF protocol assignments; before Python 3.11.10, only a part is not `is_global`
    IPv4Network("192.88.99.0/24"),  # 6to4 relays
    IPv6Network("2001::/23"),  # IETF protocol assignments, such as Teredo and ORCHID
    IPv6Network("2001:db8::/32"),  # documentation
    IPv6Network("2002::/16"),  # 6to4
    IPv6Network("2620:4f:8000::/48"),  # AS112 sinks
    IPv6Network("3fff::/20"),  # documentation
)
"""Special networks among the global addresses: https://www.iana.org/assignments/iana-ipv6-special-registry/ and
https://www.iana.org/assignments/iana-ipv4-special-registry/."""


@dataclass(frozen=True)
class Target:
    """The URL to connect to, with a literal address, and the host for the `Host` header and TLS."""

    url: httpx.URL
    host: str


def check_url(url: str, settings: WebhookSettings) -> str:
    """Check a URL without resolving its host, and return the host.

    Raises:
        ForbiddenTargetError: the URL is invalid, not https, has user information, or has a literal address that is not
            public. The settings `allow_http` and `allow_private` relax this.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        # `urlsplit` accepts URLs that httpx and the IDNA encoding of the look-up reject, so all three must accept it.
        httpx.URL(url)
        (host or "").encode("idna")
    except (ValueError, httpx.InvalidURL) as error:
        raise ForbiddenTargetError("The URL is not valid.") from error
    schemes = ("https", "http") if settings.allow_http else ("https",)
    if parts.scheme not in schemes:
        raise ForbiddenTargetError(f"The URL must begin with {' or '.join(schemes)}://.")
    if not host or port == 0 or parts.username is not None or parts.password is not None:
        raise ForbiddenTargetError("The URL must have a host, and no user information.")
    try:
        literal = ip_address(host)
    except ValueError:
        return host
    _check_address(literal, settings)
    return host


def resolve(url: str, settings: WebhookSettings) -> Target:
    """Check a URL, resolve its host once, and return the first address.

    Raises:
        ForbiddenTargetError: `check_url` refuses the URL, its host does not resolve, or one of its addresses is not
            public.
    """
    host = check_url(url, settings)
    parsed = httpx.URL(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ForbiddenTargetError("The URL's host has no address.") from error
    addresses = [ip_address(str(entry[4][0]).split("%")[0]) for entry in found]
    for address in addresses:
        _check_address(address, settings)
    return Target(url=parsed.copy_with(host=str(addresses[0]), port=port), host=parsed.netloc.decode())


def _check_address(address: Address, settings: WebhookSettings) -> None:
    if not settings.allow_private and not _is_public(address):
        raise ForbiddenTargetError("The URL's host is not a public address.")


def _is_public(address: Address) -> bool:
    if any(address in network for network in SPECIAL):
        return False
    if isinstance(address, IPv6Address):
        return address in GLOBAL_UNICAST
    return address.is_global and not address.is_multicast
