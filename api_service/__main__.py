"""`python -m api_service`: serve the API with granian until SIGTERM or SIGINT."""

import logging
import os
import sys
import tempfile

from granian.constants import Interfaces
from granian.server import Server

from api_service.http.concurrency import server_threads
from shared.errors import ConfigurationError
from shared.logging import configure as configure_logging
from shared.settings import Settings, get_settings
from shared.storage import get_blobs

TARGET = "api_service.app:served_app"
CONNECTIONS = 1024
"""What one process holds open at a time; `api.threads` requests of them are worked on."""
STOP_WAIT_S = 10
"""Requests in work get this long to end; waits and streams end by themselves."""

GRANIAN_LOGGING = {
    "formatters": {},
    "handlers": {},
    "loggers": {"_granian": {"handlers": [], "propagate": True}, "granian.access": {"handlers": []}},
}
"""Granian logs as everything else does."""


def main() -> int:
    try:
        settings = get_settings()
        get_blobs()  # a wrong `storage.url` is told now, not to the first client who uploads
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logging(settings, "api")
    logging.getLogger("_granian").addFilter(_is_not_about_threads)
    if settings.api.workers == 1 or "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        serve(settings)
    else:
        # Several processes answer `/metrics` with the numbers of all.
        with tempfile.TemporaryDirectory(prefix="afterimage-metrics-") as folder:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            serve(settings)
    return 0


def serve(settings: Settings) -> None:
    Server(
        TARGET,
        factory=True,
        interface=Interfaces.WSGI,
        address=settings.api.host,
        port=settings.api.port,
        workers=settings.api.workers,
        blocking_threads=server_threads(settings.api),
        # It counts connections, idle ones included: were it the number of threads, as many idle clients would lock
        # everybody else out.
        backpressure=CONNECTIONS,
        respawn_failed_workers=True,
        workers_kill_timeout=STOP_WAIT_S,
        websockets=False,
        log_dictconfig=GRANIAN_LOGGING,
    ).serve()


def _is_not_about_threads(record: logging.LogRecord) -> bool:
    # Granian warns of more threads than processors; ours wait for databases and for jobs.
    return not record.getMessage().startswith("Configuration allows spawning")


if __name__ == "__main__":
    sys.exit(main())
