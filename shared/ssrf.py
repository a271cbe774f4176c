"""Protection against server-side request forgery (SSRF): checks URLs that users give before the service calls them.

A host's name is resolved once, and the connection goes to the checked address. The name is used only in `Host` and in
TLS. With a second look-up, the name could resolve to another address (DNS rebinding).
"""

import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

import httpx

from shared.errors import ForbiddenTargetError
from shared.settings import WebhookSettings

Address = IPv4Address | IPv6Address
NAT64 = IPv6Network("64:ff9b::/96")


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
    if settings.allow_private:
        return
    for candidate in (address, *_embedded_ipv4(address)):
        if not candidate.is_global or candidate.is_multicast:
            raise ForbiddenTargetError("The URL's host is not a public address.")


def _embedded_ipv4(address: Address) -> list[IPv4Address]:
    """IPv4 addresses that an IPv6 address embeds: mapped, 6to4, Teredo, NAT64 (RFC 6052)."""
    if isinstance(address, IPv4Address):
        return []
    found = [part for part in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())) if part is not None]
    if address in NAT64:
        found.append(IPv4Address(int(address) & 0xFFFF_FFFF))
    return found
