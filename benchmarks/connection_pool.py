"""How many database connections does the pool save?

    make up && . var/stack.env && .venv/bin/python -m benchmarks.connection_pool

64 threads, as many as two API processes have, run short transactions on the engine of `session_scope`. One run uses its
pool, the other a new connection for each transaction. The benchmark counts opened connections and the most open at
once, and times the transactions.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine, NullPool, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.conditions import report
from shared.db.session import build_engine, database_url
from shared.settings import get_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64, help="threads (default: %(default)s)")
    parser.add_argument("--transactions", type=int, default=30, help="per client (default: %(default)s)")
    arguments = parser.parse_args()
    settings = get_settings().database
    pooled = run(lambda: build_engine(settings), arguments.clients, arguments.transactions)
    single = run(
        lambda: create_engine(database_url(settings), poolclass=NullPool), arguments.clients, arguments.transactions
    )
    figures: dict[str, object] = {
        "opened, with pool": pooled.opened,
        "opened, without": single.opened,
        "fewer opened": f"{1 - pooled.opened / single.opened:.1%}",
        "most at once, with pool": pooled.most,
        "most at once, without": single.most,
        "transaction, with pool (p50)": f"{pooled.median_s * 1000:.2f} ms, waiting for a connection included",
        "transaction, without (p50)": f"{single.median_s * 1000:.2f} ms, opening it included",
        "refused without a free connection": f"{pooled.refused} with pool, {single.refused} without",
    }
    limits = f"{settings.pool_size} + {settings.max_overflow} at most"
    report("Connections with and without a pool", figures, clients=arguments.clients, pool=limits)


class RunResult:
    """The results of one run."""

    def __init__(self) -> None:
        self.opened = 0
        self.most = 0
        self.refused = 0
        self.median_s = 0.0


def run(build: Callable[[], Engine], clients: int, transactions: int) -> RunResult:
    engine, measured, times = build(), RunResult(), []
    lock, together = threading.Lock(), threading.Barrier(clients)
    open_now = 0

    @event.listens_for(engine, "connect")
    def opened(*_: object) -> None:
        nonlocal open_now
        with lock:
            measured.opened += 1
            open_now += 1
            measured.most = max(measured.most, open_now)

    @event.listens_for(engine, "close")
    def closed(*_: object) -> None:
        nonlocal open_now
        with lock:
            open_now -= 1

    def client() -> None:
        together.wait()
        for _ in range(transactions):
            started = time.perf_counter()
            try:
                with engine.begin() as connection:
                    connection.execute(text("select 1"))
            except SQLAlchemyError:
                with lock:
                    measured.refused += 1
                continue
            with lock:
                times.append(time.perf_counter() - started)

    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client) for _ in range(clients)]:
            future.result()
    engine.dispose()
    measured.median_s = statistics.median(times)
    return measured


if __name__ == "__main__":
    main()
