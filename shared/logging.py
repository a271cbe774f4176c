"""One log format for every logger of a process: ours and those of Celery, Granian and SQLAlchemy.

Code logs with the standard library. The message is the event's constant name, and the details are fields:
`logger.info("job_claimed", extra={"attempt": 2})`. Ids that apply to many lines are bound once with
`structlog.contextvars.bound_contextvars(request_id=..., job_id=...)`. Every line of that thread then carries them.
"""

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from typing import Any

import structlog
from celery.signals import setup_logging
from structlog.typing import EventDict, Processor, WrappedLogger

from shared.settings import Environment, Settings
from shared.tracing import add_trace_id

REDACTED = "[redacted]"
SECRET_NAME = re.compile(
    r"passw(or)?d|secret|authorization|api_?key|access_?key|private_?key|credential|cookie|token$", re.I
)
SECRETS_IN_TEXT = [
    # scheme://user:password@host
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@'\"]*):[^\s/@'\"]+@", re.I), r"\1:" + REDACTED + "@"),
    (re.compile(r"\b(bearer|basic)\s+[a-z0-9._~+/=-]{6,}", re.I), r"\1 " + REDACTED),
    (
        re.compile(r"\b((?:password|passwd|secret|api_?key|access_?token)['\"]?\s*[=:]\s*['\"]?)[^\s'\"&,;]+", re.I),
        r"\1" + REDACTED,
    ),
]
# Characters that move the cursor, end a line, or change the reading direction. A traceback keeps its line ends.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
CONTROL_IN_TRACEBACK = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
TRACEBACKS = ("exception", "stack")
# Libraries that log every request, statement or message at INFO. httpx logs whole URLs, and Celery repeats the line of
# each job. Only their warnings are logged.
NOISY_LOGGERS = (
    "botocore",
    "celery.app.trace",
    "celery.worker.strategy",
    "filelock",
    "httpcore",
    "httpx",
    "kombu",
    "PIL",
    "sqlalchemy",
    "urllib3",
    "werkzeug",
)
MAX_REDACTION_DEPTH = 6
"""Values nested deeper are logged as text, which is also redacted."""


def configure(settings: Settings, service: str) -> None:
    """Send every log line of this process to stderr: JSON, or readable text in the local and test environments.

    Call it once, early. It removes the handlers that libraries have added to their loggers. Uncaught exceptions are
    logged too, also those of threads.
    """
    as_json = settings.logging.format == "json" or (
        settings.logging.format == "auto" and settings.environment not in (Environment.LOCAL, Environment.TEST)
    )
    shared_steps: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        *([add_trace_id] if settings.traces.enabled else []),
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last_steps: list[Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        _origin_adder(service),
        structlog.processors.format_exc_info,
        redact,
    ]
    if as_json:
        last_steps.append(structlog.processors.JSONRenderer(serializer=json.dumps, default=str))
    else:
        plain = structlog.dev.plain_traceback  # the default one shows local variables, which may be secrets
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
        last_steps += [escape_control_characters, renderer]
    structlog.configure(
        processors=[*shared_steps, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared_steps, processors=last_steps))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.logging.level)
    for name in list(root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    # Celery sets up its own logging unless this signal has a receiver.
    setup_logging.connect(_keep_logging)


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Mask values whose names look like secrets, at any depth, and credentials inside texts."""
    return {name: _redacted(value, str(name)) for name, value in event.items()}


def escape_control_characters(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Keep one event on one line: a prompt must not forge a log line or move the terminal's cursor.

    It is for the readable format: JSON escapes these characters itself.
    """
    return {
        _escaped(name, CONTROL): _escaped(value, CONTROL_IN_TRACEBACK if name in TRACEBACKS else CONTROL)
        for name, value in event.items()
    }


def _redacted(value: Any, name: str = "", depth: int = 0) -> Any:
    if SECRET_NAME.search(name) and not isinstance(value, bool | int | float | None):
        return REDACTED
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth < MAX_REDACTION_DEPTH and isinstance(value, Mapping):
        return {str(key): _redacted(item, str(key), depth + 1) for key, item in value.items()}
    if depth < MAX_REDACTION_DEPTH and type(value) in (list, tuple, set, frozenset):
        return [_redacted(item, depth=depth + 1) for item in value]
    text = str(value)
    for pattern, replacement in SECRETS_IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _escaped(value: Any, unwanted: re.Pattern[str]) -> Any:
    # The renderer writes a list or a mapping by `repr`, which escapes the characters.
    if value is None or isinstance(value, bool | int | float | list | dict):
        return value
    return unwanted.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))


def _origin_adder(service: str) -> Processor:
    def add_origin(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**event, "service": service, "pid": os.getpid()}

    return add_origin


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        logging.getLogger(__name__).critical("uncaught_exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
        thread = failure.thread.name if failure.thread else None
        exception = (failure.exc_type, failure.exc_value, failure.exc_traceback)
        logging.getLogger(__name__).critical("uncaught_exception", exc_info=exception, extra={"thread_name": thread})


def _keep_logging(**_: Any) -> None:
    pass
