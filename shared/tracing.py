"""Traces: spans of the product's own stages. They are recorded when the settings ask for it: see docs/operations.md.

Without traces a span costs one comparison, and OpenTelemetry is not imported. `shared.trace_recorder` does the rest.
Spans of statements and Redis commands come from OpenTelemetry's own libraries.

Every span gets the ids that log lines have: `request_id`, `job_id` and `attempt`, as far as they are bound. No span
has a prompt, a key, a URL or the parameters of a statement.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from structlog.typing import EventDict, WrappedLogger

from shared.errors import ConfigurationError
from shared.settings import Settings

if TYPE_CHECKING:
    from shared.trace_recorder import Recorder

logger = logging.getLogger(__name__)

TraceContext = dict[str, str]
"""A span that others continue or link to: its `traceparent` in the form of W3C Trace Context
(https://www.w3.org/TR/trace-context/), and those of `IDS` that are known."""
IDS = ("request_id", "job_id")
Kind = Literal["internal", "server", "producer", "consumer"]

LIBRARIES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http", "opentelemetry.instrumentation.psycopg2")
INSTALL = "pip install '.[traces]'"

_recorder: "Recorder | None" = None
"""Set once, by `start`. Not a `process_singleton`: every span reads it, and a lock would cost more than the rest."""
_NOTHING = nullcontext()


def check_libraries(settings: Settings) -> None:
    """Check that the libraries are installed if traces are on.

    Raises:
        ConfigurationError: they are not; the message names the extra.
    """
    if settings.traces.enabled and not all(map(_is_installed, LIBRARIES)):
        raise ConfigurationError(f"traces.enabled needs the OpenTelemetry libraries, which are optional: {INSTALL}")


def start(settings: Settings, service: str) -> None:
    """Record the spans of this process from now on, if traces are on. service: as in `logging.configure`.

    Raises:
        ConfigurationError: as `check_libraries`.
    """
    global _recorder
    check_libraries(settings)
    if settings.traces.enabled and _recorder is None:
        from shared.trace_recorder import Recorder

        _recorder = Recorder(settings, service)
        logger.info("traces_on", extra={"sample_ratio": settings.traces.sample_ratio})


def stop() -> None:
    """Export the spans that wait, for a bounded time, and record no more."""
    global _recorder
    if _recorder is not None:
        recorder, _recorder = _recorder, None
        recorder.close()


def is_on() -> bool:
    return _recorder is not None


def span(
    name: str,
    attributes: Mapping[str, Any] | None = None,
    *,
    kind: Kind = "internal",
    within: TraceContext | None = None,
    root: bool = False,
    links: Iterable[TraceContext] = (),
    start_ns: int | None = None,
) -> AbstractContextManager[None]:
    """Record the block as a span of the current trace. Spans in the block belong to it.

    attributes: those that are None are left out. within: the span belongs to this one instead of the current one.
    root: without `within`, it begins a trace. links: spans of other traces that this one is about. start_ns: when it
    began (of `time.time_ns`), if that was before the block.
    """
    if _recorder is None:
        return _NOTHING
    linked = tuple(links)
    return _recorder.span(name, attributes or {}, kind=kind, within=within, root=root, links=linked, start_ns=start_ns)


def shared_span(
    name: str, attributes: Mapping[str, Any], members: Iterable[tuple[TraceContext | None, Mapping[str, Any]]]
) -> AbstractContextManager[None]:
    """Record the block as work that several traces share, such as a batch of the model.

    members: the span in each trace to which the work belongs, and the attributes of its share.

    The work gets a trace of its own, whose span links to all members. Each member gets a span of its share, which links
    back. The work of a single member is an ordinary span of its trace.
    """
    return _NOTHING if _recorder is None else _recorder.shared_span(name, attributes, list(members))


def current() -> TraceContext | None:
    """The current span, for one that continues it elsewhere; None without one."""
    return None if _recorder is None else _recorder.current()


def annotate(attributes: Mapping[str, Any]) -> None:
    """Add attributes to the current span; those that are None are left out. `error.type` marks it as failed."""
    if _recorder is not None:
        _recorder.annotate(attributes)


def read_context(values: Mapping[str, Any]) -> TraceContext | None:
    """The trace context among the headers of a message; None without one."""
    found = {name: values.get(name) for name in ("traceparent", *IDS)}
    context = {name: value for name, value in found.items() if isinstance(value, str)}
    return context if "traceparent" in context else None


def ids(context: TraceContext | None) -> dict[str, str]:
    """The ids to bind for the spans and log lines of a thread that continues this trace."""
    return {name: value for name, value in (context or {}).items() if name in IDS}


def add_trace_id(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A step of the log format: lines in a trace get its `trace_id`."""
    context = current()
    return event if context is None else {**event, "trace_id": context["traceparent"].split("-")[1]}


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # of its parent
        return False
