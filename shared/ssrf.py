"""Calls to addresses that users name: resolved once, checked, and connected to exactly as checked.

Checking a name and then connecting to it are two look-ups, and the second may answer differently (DNS rebinding), so
the connection goes to the checked address itself, with the name only in `Host` and in TLS.
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
    """Where to connect (`url`, with a literal address) and in whose name (`host`)."""

    url: httpx.URL
    host: str


def check_url(url: str, settings: WebhookSettings) -> str:
    """What can be said of a URL without resolving it; its host.

    Raises:
        ForbiddenTargetError: no https, user information in it, or a literal address that is not public.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        # What connects reads more strictly than what splits, and the look-up of a name more strictly still.
        httpx.URL(url)
        (host or "").encode("idna")
    except (ValueError, httpx.InvalidURL) as error:
        raise ForbiddenTargetError("The URL is not valid.") from error
    schemes = ("https", "http") if settings.allow_http else ("https",)
    if parts.scheme not in schemes:
        raise ForbiddenTargetError(f"The URL must begin with {' or '.join(schemes)}://.")
    if not host or port == 0 or parts.username is not None or parts.password is not None:
        raise ForbiddenTargetError("The URL must name a host, and no user.")
    try:
        literal = ip_address(host)
    except ValueError:
        return host
    _check_address(literal, settings)
    return host


def resolve(url: str, settings: WebhookSettings) -> Target:
    """Resolve a URL's host, once.

    Raises:
        ForbiddenTargetError: as `check_url`, or the name does not resolve, or any address behind it is not public.
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
    for candidate in (address, *_embedded(address)):
        if not candidate.is_global or candidate.is_multicast:
            raise ForbiddenTargetError("The URL's host is not a public address.")


def _embedded(address: Address) -> list[IPv4Address]:
    """IPv4 addresses that an IPv6 one stands for: mapped, 6to4, Teredo, NAT64 (RFC 6052)."""
    if isinstance(address, IPv4Address):
        return []
    found = [part for part in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())) if part is not None]
    if address in NAT64:
        found.append(IPv4Address(int(address) & 0xFFFF_FFFF))
    return found
