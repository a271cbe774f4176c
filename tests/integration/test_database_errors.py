"""A failed statement or connection raises an error that names the true cause. On a real database."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from psycopg2 import extensions
from sqlalchemy import func, literal, make_url, select, text
from sqlalchemy.orm import Session

from shared.db.session import get_engine, session_scope
from shared.errors import DatabaseConflictError, DatabaseConnectionError, DatabaseError, DatabaseQueryError
from shared.settings import Settings
from tests.conftest import forget_process_resources
from worker_service.workers.process import WorkerProcess

NO_CONNECTION = "The database has no free connection."


def failure(*statements: str) -> DatabaseError:
    def execute() -> None:
        with session_scope() as session:
            for statement in statements:
                session.execute(text(statement))

    with pytest.raises(DatabaseError) as raised:
        execute()
    return raised.value


def test_a_deadlock_is_called_a_conflict(settings: Settings) -> None:
    with session_scope() as session:
        session.execute(text("create table counters as select id, 0 as value from generate_series(1, 2) id"))
    both = threading.Barrier(2)

    def add_to(first: int, second: int) -> None:
        with session_scope() as session:
            for number in (first, second):
                session.execute(text("update counters set value = value + 1 where id = :id"), {"id": number})
                if number == first:
                    both.wait(10)

    with ThreadPoolExecutor(2) as threads:
        ended = [threads.submit(add_to, 1, 2).exception, threads.submit(add_to, 2, 1).exception]
        (error,) = [error for exception in ended if (error := exception(30)) is not None]
    assert isinstance(error, DatabaseConflictError)
    assert (error.code, error.status, error.retry_after_s) == ("database_conflict", 503, 1)
    assert "conflicted" in error.message


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03"])
def test_conflicts_of_transactions_are_temporary(settings: Settings, code: str) -> None:
    error = failure(f"do $$ begin raise exception using errcode = '{code}'; end $$")
    assert isinstance(error, DatabaseConflictError)
    assert isinstance(error, DatabaseConnectionError), "such a task runs again"


def test_a_statement_over_its_time_limit_is_not_called_a_lost_connection(settings: Settings) -> None:
    error = failure("set local statement_timeout = 50", "select pg_sleep(10)")
    assert (error.code, error.message) == ("database_unavailable", "A database statement took too long.")


def test_a_full_disk_is_named_by_its_code(settings: Settings) -> None:
    error = failure("do $$ begin raise exception using errcode = '53100'; end $$")
    assert (error.code, "53100" in error.message) == ("database_unavailable", True)


def test_a_statement_that_cannot_work_is_a_failed_query(settings: Settings) -> None:
    assert type(failure("select nonsense")) is DatabaseQueryError


def test_a_full_pool_is_called_a_lack_of_connections(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"POOL_SIZE": "1", "MAX_OVERFLOW": "0", "POOL_TIMEOUT_S": "0.05"}.items():
        monkeypatch.setenv(f"AFTERIMAGE_DATABASE__{name}", value)
    forget_process_resources()
    with get_engine().connect():
        error = failure()
    assert (error.code, error.message) == ("database_unavailable", NO_CONNECTION)


def test_a_full_server_is_called_a_lack_of_connections(
    settings: Settings, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.execute(text("create role limited login password 'limited' connection limit 0"))
    session.commit()
    try:
        url = make_url(settings.database.url.get_secret_value()).set(username="limited", password="limited")
        monkeypatch.setenv("AFTERIMAGE_DATABASE__URL", url.render_as_string(hide_password=False))
        forget_process_resources()
        error = failure()
    finally:
        session.execute(text("drop role limited"))
        session.commit()
    assert (error.code, error.message) == ("database_unavailable", NO_CONNECTION)


def test_a_connection_that_is_lost_after_a_single_read_costs_no_place_in_the_pool(settings: Settings) -> None:
    engine = get_engine()
    for _ in range(3):
        with session_scope(single_read=True) as session:
            pid = session.scalar(select(func.pg_backend_pid()))
            with session_scope() as other:
                assert other.scalar(select(func.pg_terminate_backend(pid, 5000)))
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of a QueuePool
    with session_scope(single_read=True) as session:
        assert session.scalar(select(literal(1))) == 1


def test_a_single_read_is_one_round_trip(settings: Settings) -> None:
    with session_scope(single_read=True) as session:
        session.scalar(select(literal(1)))
        raw = session.connection().connection.driver_connection
        assert raw is not None
        assert raw.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE
    with session_scope() as session:
        session.scalar(select(literal(1)))
        raw = session.connection().connection.driver_connection
        assert raw is not None
        assert raw.info.transaction_status == extensions.TRANSACTION_STATUS_INTRANS, "the next user has transactions"


def test_a_server_that_does_not_answer_cannot_be_reached(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_DATABASE__URL", "postgresql+psycopg2://user@127.0.0.1:1/none")
    forget_process_resources()
    error = failure()
    assert (error.code, error.message) == ("database_unavailable", "The database cannot be reached.")


def test_a_task_that_meets_a_conflict_logs_its_cause_in_one_line(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    app = WorkerProcess("embed", None, settings).app()

    @app.task(name="conflicts")
    def conflicts() -> None:
        raise DatabaseConflictError

    @app.task(name="is_wrong")
    def is_wrong() -> None:
        raise DatabaseQueryError

    with caplog.at_level(logging.WARNING):
        conflicts.apply()
    (record,) = caplog.records
    assert (record.message, record.exc_info) == ("task_interrupted", None)
    logged = vars(record)
    assert (logged["task"], logged["cause"]) == ("conflicts", "database_conflict")
    assert logged["detail"] == DatabaseConflictError().message
    caplog.clear()
    is_wrong.apply()
    assert [record.exc_info is not None for record in caplog.records] == [True], "a mistake of ours has its traceback"
