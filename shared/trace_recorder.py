"""Records the spans of `shared.tracing` with OpenTelemetry, and exports them by OTLP over HTTP.

Only `shared.tracing.start` imports this module, and only when traces are on.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.psycopg2 import Psycopg2Instrumentor
from opentelemetry.instrumentation.redis import RedisInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind, Status, StatusCode, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes
from structlog.contextvars import bind_contextvars, bound_contextvars, get_contextvars, unbind_contextvars

from shared.settings import Settings
from shared.tracing import IDS, Kind, TraceContext, ids
from shared.version import VERSION

logger = logging.getLogger(__name__)

MAX_WAITING_SPANS = 4096
"""More are dropped. With a long statement, a span takes about 4 KB."""
MAX_EXPORTED_SPANS = 512
EXPORT_INTERVAL_MS = 1000
CLOSE_TIMEOUT_S = 2.0
WARN_INTERVAL_S = 60.0
"""Shortest time between two log lines about spans that were not exported."""
KINDS: dict[Kind, SpanKind] = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}
PROPAGATOR = TraceContextTextMapPropagator()


class Recorder:
    """Records spans until it is closed. One per process."""

    def __init__(self, settings: Settings, service: str) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(RootSampler(settings.traces.sample_ratio)),
            resource=Resource.create(
                {
                    "service.namespace": "afterimage",
                    "service.name": f"afterimage-{service}",
                    "service.version": VERSION,
                    "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
                    "deployment.environment.name": settings.environment.value,
                }
            ),
            shutdown_on_exit=False,  # `close` does it, in a bounded time
        )
        self._provider.add_span_processor(IdsAdder())
        self._provider.add_span_processor(
            BatchSpanProcessor(
                BoundedExporter(settings),
                max_queue_size=MAX_WAITING_SPANS,
                max_export_batch_size=MAX_EXPORTED_SPANS,
                schedule_delay_millis=EXPORT_INTERVAL_MS,
            )
        )
        self._tracer = self._provider.get_tracer("afterimage", VERSION)
        self._instrumentors = (Psycopg2Instrumentor(), RedisInstrumentor())
        for instrumentor in self._instrumentors:
            instrumentor.instrument(tracer_provider=self._provider)

    def close(self) -> None:
        """Export the spans that wait, for at most `CLOSE_TIMEOUT_S`."""
        for instrumentor in self._instrumentors:
            instrumentor.uninstrument()
        # The SDK waits half a minute for a collector that does not answer.
        closing = threading.Thread(target=self._provider.shutdown, name="close-traces", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    @contextmanager
    def span(
        self,
        name: str,
        attributes: Mapping[str, Any],
        *,
        kind: Kind = "internal",
        within: TraceContext | None = None,
        root: bool = False,
        links: Sequence[TraceContext] = (),
        start_ns: int | None = None,
    ) -> Iterator[None]:
        """See `tracing.span`."""
        parent = _context(within) if within is not None else Context() if root else None
        span = self._tracer.start_span(
            name,
            parent,
            KINDS[kind],
            _attributes(attributes),
            links=[_link(each) for each in links],
            start_time=start_ns,
        )
        token = attach(trace.set_span_in_context(span))
        try:
            yield
        except BaseException as error:
            _mark_failed(span, error)
            raise
        finally:
            detach(token)
            span.set_attributes(_ids())  # a job's id is bound after the request has begun
            span.end()

    @contextmanager
    def shared_span(
        self,
        name: str,
        attributes: Mapping[str, Any],
        members: Sequence[tuple[TraceContext | None, Mapping[str, Any]]],
    ) -> Iterator[None]:
        """See `tracing.shared_span`."""
        traced = [(context, share) for context, share in members if context is not None]
        if len(traced) == 1:
            context, share = traced[0]
            with bound_contextvars(**ids(context)), self.span(name, {**attributes, **share}, within=context):
                yield
            return
        with _no_ids_bound(), self._shared_by_several(name, attributes, traced):
            yield

    @contextmanager
    def _shared_by_several(
        self, name: str, attributes: Mapping[str, Any], members: Sequence[tuple[TraceContext, Mapping[str, Any]]]
    ) -> Iterator[None]:
        failure: BaseException | None = None
        start_ns, work = time.time_ns(), None
        try:
            with self.span(name, attributes, root=True, links=[context for context, _ in members]):
                work = self.current()
                yield
        except BaseException as error:
            failure = error
            raise
        finally:
            links = [] if work is None else [_link(work)]
            for context, share in members:
                span = self._tracer.start_span(
                    name,
                    _context(context),
                    attributes=_attributes({**ids(context), **attributes, **share}),
                    links=links,
                    start_time=start_ns,
                )
                if failure is not None:
                    _mark_failed(span, failure)
                span.end()

    def current(self) -> TraceContext | None:
        """See `tracing.current`."""
        carrier: TraceContext = {}
        PROPAGATOR.inject(carrier)
        if "traceparent" not in carrier:
            return None
        return {**carrier, **ids(get_contextvars())}

    def annotate(self, attributes: Mapping[str, Any]) -> None:
        """See `tracing.annotate`."""
        span = trace.get_current_span()
        span.set_attributes(_attributes(attributes))
        if attributes.get("error.type") is not None:
            span.set_status(Status(StatusCode.ERROR))


class RootSampler(Sampler):
    """Decides which traces are recorded, at their first span.

    Requests and jobs are chosen by the ratio. Shared work is recorded if it links to a recorded trace. Other work, such
    as the statement of a heartbeat, is not recorded.
    """

    def __init__(self, ratio: float) -> None:
        self._by_ratio = TraceIdRatioBased(ratio)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        if kind in (SpanKind.SERVER, SpanKind.PRODUCER, SpanKind.CONSUMER):
            return self._by_ratio.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        sampled = any(link.context.trace_flags.sampled for link in links or ())
        return SamplingResult(Decision.RECORD_AND_SAMPLE if sampled else Decision.DROP, attributes)

    def get_description(self) -> str:
        return f"RootSampler({self._by_ratio.get_description()})"


class IdsAdder(SpanProcessor):
    """Adds the ids of the request and the job to every span, those of libraries included."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        span.set_attributes(_ids())


class BoundedExporter(SpanExporter):
    """Exports spans without the messages of exceptions, and logs at most once per `WARN_INTERVAL_S` that it cannot."""

    def __init__(self, settings: Settings) -> None:
        traces = settings.traces
        self._exporter = OTLPSpanExporter(
            endpoint=traces.endpoint,
            headers={name: value.get_secret_value() for name, value in traces.headers.items()},
            timeout=traces.timeout_s,
        )
        # It logs every attempt, with the address.
        logging.getLogger(OTLPSpanExporter.__module__).setLevel(logging.CRITICAL)
        self._warn_from = float("-inf")
        self._not_exported = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export([_without_messages(span) for span in spans])
        if result is not SpanExportResult.SUCCESS:
            self._not_exported += len(spans)
            if time.monotonic() >= self._warn_from:
                logger.warning("traces_not_exported", extra={"spans": self._not_exported})
                self._warn_from, self._not_exported = time.monotonic() + WARN_INTERVAL_S, 0
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


def _without_messages(span: ReadableSpan) -> ReadableSpan:
    """The span with the kind of its exception only: a message of the database may contain values of a row."""
    if not span.events and span.status.description is None:
        return span
    kind = (span.status.description or "").partition(":")[0]
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=span.attributes,
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code, kind if span.status.status_code is StatusCode.ERROR else None),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _context(context: TraceContext) -> Context:
    return PROPAGATOR.extract(context, Context())


def _link(context: TraceContext) -> Link:
    return Link(trace.get_current_span(_context(context)).get_span_context())


def _ids() -> dict[str, Any]:
    bound = get_contextvars()
    return {name: bound[name] for name in (*IDS, "attempt") if name in bound}


@contextmanager
def _no_ids_bound() -> Iterator[None]:
    """Unbind the ids of this thread's own job in the block, whose work is not for that job alone."""
    own = _ids()
    unbind_contextvars(*own)
    try:
        yield
    finally:
        bind_contextvars(**own)


def _attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _mark_failed(span: trace.Span, error: BaseException) -> None:
    span.set_attribute("error.type", getattr(error, "code", None) or type(error).__name__)
    span.set_status(Status(StatusCode.ERROR))
