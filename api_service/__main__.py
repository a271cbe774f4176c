"""`python -m api_service`: serves the API with granian until SIGTERM or SIGINT."""

import gc
import logging
import os
import sys
import tempfile
from typing import TYPE_CHECKING

from granian.constants import Interfaces
from granian.server import Server

from shared.errors import ConfigurationError
from shared.logging import configure as configure_logging
from shared.settings import APISettings, Settings, get_settings
from shared.storage import get_blobs
from shared.tracing import check_libraries

if TYPE_CHECKING:
    from flask import Flask

APP_FACTORY = "api_service.__main__:imported_app"
PROBE_THREADS = 8
MAX_CONNECTIONS = 1024
"""Open connections per process. `api.threads` of their requests are processed at a time."""
SHUTDOWN_TIMEOUT_S = 10
"""Time for active requests to end after a stop signal. Waits and streams end on the signal itself."""

GRANIAN_LOGGING = {
    "formatters": {},
    "handlers": {},
    "loggers": {"_granian": {"handlers": [], "propagate": True}, "granian.access": {"handlers": []}},
}
"""Granian's records go through the root logger, like all others."""


def main() -> int:
    try:
        settings = get_settings()
        get_blobs()  # fail at the start, not at the first upload, if `storage.url` is wrong
        check_libraries(settings)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logging(settings, "api")
    logging.getLogger("_granian").addFilter(_is_not_thread_warning)
    if settings.api.workers == 1 or "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        serve(settings)
    else:
        # `/metrics` must cover all processes, whichever of them answers.
        with tempfile.TemporaryDirectory(prefix="afterimage-metrics-") as folder:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            serve(settings)
    return 0


def imported_app() -> "Flask":
    """Import and create the application in a worker process of granian.

    Nearly all objects of the import live as long as the process. Garbage collections during the import took a fifth of
    its time, and later ones would look at these objects again and again.
    """
    gc.disable()
    from api_service.app import served_app

    app = served_app()
    gc.freeze()
    gc.enable()
    return app


def serve(settings: Settings) -> None:
    Server(
        APP_FACTORY,
        factory=True,
        interface=Interfaces.WSGI,
        address=settings.api.host,
        port=settings.api.port,
        workers=settings.api.workers,
        blocking_threads=server_threads(settings.api),
        # A limit on connections, idle ones included. With the number of threads as the limit, that many idle clients
        # would block all others.
        backpressure=MAX_CONNECTIONS,
        respawn_failed_workers=True,
        workers_kill_timeout=SHUTDOWN_TIMEOUT_S,
        websockets=False,
        log_dictconfig=GRANIAN_LOGGING,
    ).serve()


def server_threads(settings: APISettings) -> int:
    """Number of threads for active requests, all kinds of waits, and probes: see `api_service.http.concurrency`."""
    waits = settings.max_waiters + settings.max_slow_bodies + settings.max_downloads + settings.threads
    return settings.threads + waits + PROBE_THREADS


def _is_not_thread_warning(record: logging.LogRecord) -> bool:
    # Granian warns of more threads than processors. Here most threads wait, for the database or for a job.
    return not record.getMessage().startswith("Configuration allows spawning")


if __name__ == "__main__":
    sys.exit(main())
