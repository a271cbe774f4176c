"""Start one worker process: `python -m worker_service embed` or `python -m worker_service generate [--model NAME]`."""

import argparse
import logging
import sys

from shared import logging as logs
from shared import metrics
from shared.errors import BaseAppException
from shared.settings import get_settings
from worker_service.celery_app import WorkerProcess, serve_embed, serve_generate
from worker_service.leases import Leases
from worker_service.models import Embedder, Models

logger = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m worker_service", description=__doc__)
    parser.add_argument("kind", choices=["embed", "generate"], help="what this process serves")
    parser.add_argument("--model", help="generate: which configured generator (default: the settings' choice)")
    arguments = parser.parse_args()
    try:
        _serve(arguments.kind, arguments.model)
    except BaseAppException as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        raise SystemExit(2) from error


def _serve(kind: str, model: str | None) -> None:
    settings = get_settings()
    logs.configure(settings, service=f"worker.{kind}")
    metrics.serve(settings.metrics)
    if kind == "embed":
        process = WorkerProcess("embed", None, settings)
        process.announce("loading")
        embedder = Embedder.load(settings)
        serve_embed(process, embedder)
        embedder.close(settings.jobs.shutdown_grace_s)
        return
    name = model or settings.worker.generator or settings.model.default_generator
    process = WorkerProcess("generate", name, settings)
    process.announce("loading")
    models = Models.load(name, settings)
    with Leases(settings.jobs) as leases:
        serve_generate(process, models, leases)
    models.close(settings.jobs.shutdown_grace_s)


if __name__ == "__main__":
    main()
