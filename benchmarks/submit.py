"""How long does a submit take, and what does it cost the API and the database?

    .venv/bin/python -m benchmarks.submit
    .venv/bin/python -m benchmarks.submit --requests 2000

Starts its own stack without workers, with API keys and durable commits. First one client sends one request after the
other, then eight clients do so at once. Every answer must be a 202. Times of a loaded machine are worth little: compare
the processor time and the commits per request, or two releases in one sitting.
"""

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import SecretStr
from sqlalchemy import Engine, text

from benchmarks.conditions import report, save
from benchmarks.sampling import cpu_s
from shared.db.session import build_engine
from shared.settings import DatabaseSettings
from tests.stack import RunningStack, running_stack

ENVIRONMENT = {
    "AFTERIMAGE_ENVIRONMENT": "test",
    "AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "fake"}}',
    "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "cheap",
    "AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true",
    "AFTERIMAGE_LIMITS__WRITES_PER_MINUTE": "1000000",
}
NO_WORKERS = ("--generate", "0", "--embed", "0", "--io", "0")
CLIENTS = (1, 8)
WARM_UP = 100
STATISTICS_S = 1.5
"""A session of Postgres reports its counts at most once a second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="per number of clients (default: %(default)s)")
    requests = parser.parse_args().requests
    figures: dict[str, object] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_stack(Path(folder, "var"), environment=ENVIRONMENT, options=NO_WORKERS, durable=True) as stack,
    ):
        key = stack.new_key("benchmark", "generate")
        engine = build_engine(DatabaseSettings(url=SecretStr(stack.environment()["AFTERIMAGE_DATABASE__URL"])))
        closed_loop(stack.url, key, clients=2, requests=WARM_UP)
        for clients in CLIENTS:
            figures[f"{clients} at once"] = measure(stack, engine, key, clients=clients, requests=requests)
        engine.dispose()
    report("Submits", figures, requests=requests)
    print(f"wrote {save('submit', figures, requests=requests)}")


def measure(stack: RunningStack, engine: Engine, key: str, *, clients: int, requests: int) -> dict[str, float]:
    pids = {name: stack.control.pid(name) for name in ("api", "postgres")}
    time.sleep(STATISTICS_S)
    commits, spent, started = count_commits(engine), cpu_s(pids), time.perf_counter()
    latencies = closed_loop(stack.url, key, clients=clients, requests=requests)
    seconds, spent_after = time.perf_counter() - started, cpu_s(pids)
    time.sleep(STATISTICS_S)
    p = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "p50 ms": round(p[49] * 1000, 2),
        "p99 ms": round(p[98] * 1000, 1),
        "per second": round(len(latencies) / seconds),
        "commits per request": round((count_commits(engine) - commits) / len(latencies), 2),
        **{f"{name} CPU ms": round((spent_after[name] - spent[name]) * 1000 / len(latencies), 2) for name in pids},
    }


def count_commits(engine: Engine) -> int:
    with engine.connect() as connection:
        found = connection.scalar(text("select xact_commit from pg_stat_database where datname = current_database()"))
    assert found is not None
    return int(found)


def closed_loop(url: str, key: str, *, clients: int, requests: int) -> list[float]:
    """Let each client send its share of the requests, one after the other; return the latencies in seconds."""
    latencies: list[float] = []
    errors: list[BaseException] = []

    def client() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        body = json.dumps({"prompt": "a red apple", "num_images": 1})
        try:
            for _ in range(requests // clients):
                started = time.perf_counter()
                connection.request("POST", "/api/v1/generate", body, headers)
                answer = connection.getresponse()
                content = answer.read()
                latencies.append(time.perf_counter() - started)
                assert answer.status == 202, content
        except BaseException as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return latencies


if __name__ == "__main__":
    main()
