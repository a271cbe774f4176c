"""The format and the fields of log lines, and the secrets that they never contain."""

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from pydantic import SecretStr
from sqlalchemy import make_url
from structlog.contextvars import bound_contextvars, clear_contextvars

from shared.logging import REDACTED, configure
from shared.settings import Environment, LoggingSettings, SecuritySettings, Settings, load_settings

Lines = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers, root.level, sys.excepthook, threading.excepthook
    yield
    root.handlers, level, sys.excepthook, threading.excepthook = before
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    clear_contextvars()  # a request of an earlier test has left its id in this thread
    return lambda: capsys.readouterr().err.splitlines()


def as_json(lines: Lines) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines()]


def production(level: str = "INFO") -> Settings:
    return load_settings(
        environment=Environment.PRODUCTION,
        security=SecuritySettings(require_api_keys=True),
        logging=LoggingSettings.model_validate({"level": level}),
    )


def test_production_writes_one_json_object_per_line(lines: Lines) -> None:
    configure(production(), service="api")
    logging.getLogger("some.module").info("job_claimed", extra={"attempt": 2, "worker": None})
    (line,) = as_json(lines)
    assert line["event"] == "job_claimed"
    assert (line["attempt"], line["worker"], line["level"], line["logger"]) == (2, None, "info", "some.module")
    assert (line["service"], line["pid"]) == ("api", os.getpid())
    assert line["timestamp"].endswith("Z")


def test_local_lines_are_readable(lines: Lines) -> None:
    configure(load_settings(), service="api")
    logging.getLogger("some.module").info("job_claimed", extra={"attempt": 2})
    (line,) = lines()
    assert "job_claimed" in line
    assert "attempt=2" in line
    assert not line.startswith("{")


@pytest.mark.parametrize("readable", [False, True], ids=["json", "console"])
def test_a_list_is_logged_as_a_list(readable: bool, lines: Lines) -> None:
    configure(load_settings() if readable else production(), service="reconciler")
    logging.getLogger("x").warning("leases_expired", extra={"jobs": ["a1", "b2"]})
    (line,) = lines()
    if readable:
        assert "jobs=['a1', 'b2']" in line
    else:
        assert json.loads(line)["jobs"] == ["a1", "b2"]


def test_the_format_can_be_chosen(lines: Lines) -> None:
    configure(load_settings(logging=LoggingSettings(format="json")), service="api")
    logging.getLogger("x").info("a")
    configure(production().model_copy(update={"logging": LoggingSettings(format="console")}), service="api")
    logging.getLogger("x").info("b")
    first, second = lines()
    assert json.loads(first)["event"] == "a"
    assert not second.startswith("{")


def test_bound_ids_are_on_every_line_of_their_own_thread_only(lines: Lines) -> None:
    configure(production(), service="worker")
    logger = logging.getLogger("x")
    with bound_contextvars(job_id="j1", request_id="r1"):
        logger.info("inside")
        thread = threading.Thread(target=logger.info, args=("elsewhere",))
        thread.start()
        thread.join()
    logger.info("after")
    seen = {line["event"]: (line.get("job_id"), line.get("request_id")) for line in as_json(lines)}
    assert seen == {"inside": ("j1", "r1"), "elsewhere": (None, None), "after": (None, None)}


def test_structlogs_own_loggers_write_the_same_lines(lines: Lines) -> None:
    configure(production(), service="api")
    structlog.get_logger("x").info("hello", n=1)
    (line,) = as_json(lines)
    assert (line["event"], line["n"], line["service"], line["level"]) == ("hello", 1, "api", "info")


@pytest.mark.parametrize("name", ["celery.worker", "_granian", "granian.access", "sqlalchemy.pool"])
def test_libraries_with_handlers_of_their_own_write_the_same_lines(name: str, lines: Lines) -> None:
    library = logging.getLogger(name)
    library.addHandler(logging.StreamHandler(sys.stderr))
    library.propagate = False
    configure(production(), service="api")
    library.error("from the library")
    (line,) = as_json(lines)
    assert (line["event"], line["logger"]) == ("from the library", name)


def test_celery_does_not_set_up_logging_again(lines: Lines) -> None:
    from celery import Celery

    configure(production(), service="worker")
    app = Celery("test")
    app.log.setup(loglevel=logging.DEBUG, redirect_stdouts=True)
    logging.getLogger("celery.worker").error("still json")
    assert [line["event"] for line in as_json(lines)] == ["still json"]


def test_statements_and_request_urls_of_libraries_are_not_logged_at_info(lines: Lines) -> None:
    configure(production("DEBUG"), service="api")
    for name in ("httpx", "sqlalchemy.engine", "urllib3.connectionpool"):
        logging.getLogger(name).info("secret detail")
    assert lines() == []


def test_lines_below_the_level_are_not_written(lines: Lines) -> None:
    configure(production("WARNING"), service="api")
    logging.getLogger("x").info("low")
    logging.getLogger("x").warning("high")
    assert [line["event"] for line in as_json(lines)] == ["high"]


SECRET = "hunter2hunter2"
LEAKS: list[dict[str, Any]] = [
    {"password": SECRET},
    {"db_password": SECRET},
    {"API_KEY": SECRET},
    {"Authorization": f"Bearer {SECRET}"},
    {"headers": {"authorization": f"Bearer {SECRET}", "x": "1"}},
    {"nested": [{"deep": ({"client_secret": SECRET},)}]},
    {"cookie": {"session": SECRET}},
    {"access_token": SECRET},
    {"url": f"postgresql+psycopg2://user:{SECRET}@db:5432/x"},
    {"url": make_url(f"postgresql+psycopg2://user:{SECRET}@db:5432/x")},
    {"text": f"connecting to redis://:{SECRET}@cache:6379/0 failed"},
    {"text": f"Authorization: Bearer {SECRET}"},
    {"text": f"GET /x?api_key={SECRET}&y=1"},
    {"text": f"password='{SECRET}' host=db"},
    {"setting": SecretStr(SECRET)},
    {"settings": load_settings(storage={"options": {"access_key_id": SECRET}})},
]


@pytest.mark.parametrize("fields", LEAKS, ids=[str(number) for number in range(len(LEAKS))])
@pytest.mark.parametrize("readable", [False, True], ids=["json", "console"])
def test_secrets_are_not_logged(fields: dict[str, Any], readable: bool, lines: Lines) -> None:
    configure(load_settings() if readable else production(), service="api")
    logging.getLogger("x").warning("event", extra=fields)
    (line,) = lines()
    assert SECRET not in line


def test_secrets_in_messages_and_tracebacks_are_not_logged(lines: Lines) -> None:
    configure(production(), service="api")
    try:
        raise ConnectionError(f"cannot reach redis://user:{SECRET}@cache:6379")
    except ConnectionError:
        logging.getLogger("x").exception("failed with amqp://user:%s@host", SECRET)
    (line,) = as_json(lines)
    assert SECRET not in str(line)
    assert "ConnectionError: cannot reach redis://user:" + REDACTED in line["exception"]


def test_fields_that_only_resemble_secrets_are_logged(lines: Lines) -> None:
    configure(production(), service="api")
    fields = {"tokens": 17, "prompt": "a basic red apple", "has_password": True, "idempotency_key": "k1"}
    logging.getLogger("x").info("event", extra=fields)
    (line,) = as_json(lines)
    assert {name: line[name] for name in fields} == fields


FORGED = "a cat\n2026-11-23 [info] job_deleted\r\x1b[2J\x9b31m\u202egnp.exe\u2028x\x00\x7f"


@pytest.mark.parametrize("readable", [False, True], ids=["json", "console"])
def test_a_prompt_cannot_forge_a_line_or_move_the_cursor(readable: bool, capsys: pytest.CaptureFixture[str]) -> None:
    configure(load_settings() if readable else production(), service="api")
    logging.getLogger("x").info("search %s", FORGED, extra={"prompt": FORGED, "nested": {"prompt": [FORGED]}})
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert not set("\r\x1b\x9b\u202e\u2028\x00") & set(text)


def test_lone_surrogates_and_odd_objects_are_logged(lines: Lines) -> None:
    configure(production(), service="api")
    logging.getLogger("x").info("event", extra={"text": "\ud800", "thing": object(), "nan": float("inf")})
    assert len(as_json(lines)) == 1


def test_uncaught_exceptions_of_threads_are_logged(lines: Lines) -> None:
    configure(production(), service="worker")

    def fail() -> None:
        raise RuntimeError("boom")

    thread = threading.Thread(target=fail, name="side")
    thread.start()
    thread.join()
    (line,) = as_json(lines)
    assert (line["event"], line["thread_name"], line["level"]) == ("uncaught_exception", "side", "critical")
    assert "RuntimeError: boom" in line["exception"]


def test_warnings_are_logged(lines: Lines) -> None:
    configure(production(), service="worker")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old call", DeprecationWarning, stacklevel=1)
    (line,) = as_json(lines)
    assert "old call" in line["event"]


def test_an_uncaught_exception_ends_the_process_with_one_json_line() -> None:
    code = (
        "from shared.logging import configure; from shared.settings import *\n"
        "configure(load_settings(logging=LoggingSettings(format='json')), service='script')\n"
        "raise RuntimeError('boom')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert json.loads(line)["event"] == "uncaught_exception"
