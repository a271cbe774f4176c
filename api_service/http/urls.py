"""Paths of the API, and the prefix under which a proxy publishes the service."""

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from flask import request
from werkzeug.routing import RequestRedirect

from shared.settings import get_settings

API = "/api/v1"
"""Prefix of all paths of the API. Probes at the root, Studio, Swagger UI and metrics have none."""


def api_address(path: str) -> str:
    """Return the address of a resource for clients: its path in the API behind the prefix of the proxy."""
    return f"{get_settings().api.path_prefix}{API}{path}"


def make_redirect_relative() -> None:
    """Remove scheme and host from a redirect of the framework, because it does not know those of the proxy."""
    error = request.routing_exception
    if isinstance(error, RequestRedirect):
        error.new_url = urlsplit(error.new_url)._replace(scheme="", netloc="").geturl()


class PathPrefixMiddleware:
    """Sets the prefix of the application's addresses, and removes the prefix from paths that have it.

    Paths without it, such as those of probes, reach the service without the proxy, or through one that removes it.
    """

    def __init__(self, application: Callable[[dict[str, Any], Any], Iterable[bytes]], prefix: str) -> None:
        self._application = application
        self._prefix = prefix

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["SCRIPT_NAME"] = self._prefix
        if f"{environ['PATH_INFO']}/".startswith(f"{self._prefix}/"):
            environ["PATH_INFO"] = environ["PATH_INFO"].removeprefix(self._prefix)
        return self._application(environ, start_response)
