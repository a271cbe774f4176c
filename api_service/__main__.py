"""`python -m api_service`: serve the API with granian until SIGTERM or SIGINT."""

import sys

from granian.constants import Interfaces
from granian.server import Server

from shared.errors import ConfigurationError
from shared.settings import get_settings

TARGET = "api_service.app:served_app"
STOP_WAIT_S = 10
"""Requests and streams get this long to end."""


def main() -> int:
    try:
        settings = get_settings()
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    Server(
        TARGET,
        factory=True,
        interface=Interfaces.WSGI,
        address=settings.api.host,
        port=settings.api.port,
        workers=settings.api.workers,
        blocking_threads=settings.api.threads,
        # Connections beyond these wait in the kernel instead of in the process.
        backpressure=settings.api.threads,
        respawn_failed_workers=True,
        workers_kill_timeout=STOP_WAIT_S,
        websockets=False,
    ).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
