"""Start one worker process: `python -m worker_service embed`, `generate [--model NAME]` or `io`."""

import argparse
import sys
from importlib import import_module

from shared import logging as logs
from shared import metrics
from shared.errors import BaseAppException
from shared.pools import close_at_exit
from shared.settings import get_settings
from shared.storage import get_blobs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m worker_service", description=__doc__)
    parser.add_argument("kind", choices=["embed", "generate", "io"], help="what this process serves")
    parser.add_argument("--model", help="generate: which configured generator (default: the settings' choice)")
    arguments = parser.parse_args()
    try:
        settings = get_settings()
        close_at_exit()
        get_blobs()  # a wrong `storage.url` is told now, not by the first job
        logs.configure(settings, service=f"worker.{arguments.kind}")
        metrics.serve(settings.metrics)
        # By name, so that an io worker never loads torch.
        worker = import_module(f"worker_service.{arguments.kind}_worker")
        if arguments.kind == "generate":
            worker.serve(settings, arguments.model)
        else:
            worker.serve(settings)
    except BaseAppException as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
