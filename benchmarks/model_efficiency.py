"""How near does a generate worker come to the rate of its model, and what does an image cost besides the model?

    .venv/bin/python -m benchmarks.model_efficiency
    .venv/bin/python -m benchmarks.model_efficiency --batch-ms 50 --items 600

Starts its own stack for each batch time, with the fake generator: a batch of up to eight images takes that time, and
nothing else. One bulk keeps the worker busy. The ideal rate is eight images per batch time. Processor time and commits
are per image, after the first tenth of the bulk. The commits are those of all processes together, with their polls.
Compare two releases in one sitting, because the rate depends on the machine and its load.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from pydantic import SecretStr
from sqlalchemy import Engine, text

from afterimage_client import Afterimage, BulkOptions, header_line
from benchmarks.conditions import report, save
from benchmarks.sampling import cpu_s, load_average
from shared.db.session import build_engine
from shared.settings import DatabaseSettings
from tests.stack import RunningStack, running_stack, wait_until

BATCH_SIZE = 8
BATCH_MS = [50, 100, 200]
POLL_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-ms", type=int, nargs="+", default=BATCH_MS, help="default: %(default)s")
    parser.add_argument("--items", type=int, default=1000, help="images per bulk (default: %(default)s)")
    arguments = parser.parse_args()
    figures: dict[str, object] = {
        f"{batch_ms} ms": measure(batch_ms, arguments.items) for batch_ms in arguments.batch_ms
    }
    report("Images per second over the ideal", figures, items=arguments.items)
    print(f"wrote {save('model_efficiency', figures, items=arguments.items)}")


def measure(batch_ms: int, items: int) -> dict[str, object]:
    fake = {"kind": "fake", "cost_ms": batch_ms, "max_batch_size": BATCH_SIZE}
    fake["defaults"] = {"width": 64, "height": 64, "num_inference_steps": 4}
    environment = {
        "AFTERIMAGE_ENVIRONMENT": "test",
        "AFTERIMAGE_MODEL__GENERATORS": json.dumps({"fake": fake}),
        "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "fake",
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        running_stack(Path(folder, "var"), environment=environment, durable=True) as stack,
        Afterimage(stack.url) as service,
    ):
        engine = build_engine(DatabaseSettings(url=SecretStr(stack.environment()["AFTERIMAGE_DATABASE__URL"])))
        lines = [json.dumps({"prompt": f"one of many, number {number}"}).encode() for number in range(items)]
        header = header_line(BulkOptions())
        bulk = service.bulks.create(header, idempotency_key="benchmark")
        service.bulks.send(bulk, [header, *lines])
        first = wait_for(engine, items // 10)
        before = spent(stack, engine)
        last = wait_for(engine, items)
        after = spent(stack, engine)
        engine.dispose()
    images, seconds = last[1] - first[1], last[0] - first[0]
    return {
        "of the ideal": round(images / seconds * batch_ms / 1000 / BATCH_SIZE, 3),
        "images/s": round(images / seconds, 1),
        **{f"{name} per image": round((after[name] - before[name]) / images, 2) for name in after},
        "load average": load_average(),
    }


def wait_for(engine: Engine, succeeded: int) -> tuple[float, int]:
    """Wait until so many jobs have succeeded; return the time and their exact number."""
    seen: list[int] = []

    def enough() -> bool:
        with engine.connect() as connection:
            seen.append(connection.scalar(text("select count(*) from jobs where state = 'succeeded'")) or 0)
        time.sleep(POLL_S)
        return seen[-1] >= succeeded

    wait_until(enough, timeout_s=600, what=f"{succeeded} images")
    return time.monotonic(), seen[-1]


def spent(stack: RunningStack, engine: Engine) -> dict[str, float]:
    """Milliseconds of processor time of the worker, and commits, so far."""
    worker_s = cpu_s({"worker": stack.control.pid("generate-fake")})["worker"]
    with engine.connect() as connection:
        commits = connection.scalar(text("select xact_commit from pg_stat_database where datname = current_database()"))
    return {"worker ms": worker_s * 1000, "commits": float(commits or 0)}


if __name__ == "__main__":
    main()
