"""Start one process: `python -m worker_service embed`, `generate [--model NAME]`, `io` or `reconciler`."""

import argparse
import sys
from importlib import import_module

from shared import logging as logs
from shared import metrics, tracing
from shared.errors import BaseAppException
from shared.pools import close_at_exit
from shared.settings import get_settings
from shared.storage import get_blobs
from worker_service.readiness import get_readiness

MODULES = {
    "embed": "worker_service.workers.embed",
    "generate": "worker_service.workers.generate",
    "io": "worker_service.workers.io",
    "reconciler": "worker_service.maintenance.reconciler",
}
"""Modules by name, imported when needed: only the processes that need torch load it."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m worker_service", description=__doc__)
    parser.add_argument("kind", choices=list(MODULES), help="kind of process to start")
    parser.add_argument(
        "--model", help="generate: name of the generator (default: `worker.generator`, or the default generator)"
    )
    arguments = parser.parse_args()
    try:
        settings = get_settings()
        close_at_exit()
        get_blobs()  # a wrong `storage.url` raises an error now, not in the first job
        service = arguments.kind if arguments.kind == "reconciler" else f"worker.{arguments.kind}"
        logs.configure(settings, service)
        tracing.start(settings, service)
        metrics.serve(settings.metrics, get_readiness().is_ready)
        process = import_module(MODULES[arguments.kind])
        if arguments.kind == "generate":
            process.serve(settings, arguments.model)
        else:
            process.serve(settings)
    except BaseAppException as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
