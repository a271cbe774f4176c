"""The Flask application: registers all routes and pages, and the steps before and after every request."""

import logging
import re
import time
import uuid
from contextlib import AbstractContextManager, nullcontext

from flask import Response, g, redirect, request, url_for
from flask_openapi3.models.info import Info
from flask_openapi3.models.server import Server
from flask_openapi3_swagger.plugins import RegisterPlugin as SwaggerUI
from structlog.contextvars import bind_contextvars, clear_contextvars

from api_service import studio
from api_service.http import browser_security, multipart, problems, rate_limits, requests
from api_service.http.auth import Caller, authenticate
from api_service.http.concurrency import ConcurrencyMiddleware
from api_service.http.urls import API, PathPrefixMiddleware, make_redirect_relative
from api_service.openapi.document import DocumentedApp
from api_service.routes.admin import admin
from api_service.routes.bulks import bulks
from api_service.routes.collections import collections
from api_service.routes.generation import generation
from api_service.routes.images import images
from api_service.routes.jobs import jobs
from api_service.routes.outputs import outputs
from api_service.routes.reference_images import reference_images
from api_service.routes.search import search
from api_service.routes.service import probes, service
from api_service.routes.webhooks import webhooks
from api_service.services import job_stream
from shared import metrics, tracing
from shared.child_processes import end_with_parent
from shared.db.session import bound_waits
from shared.imaging import UploadDecoder
from shared.logging import configure as configure_logging
from shared.pools import close_at_exit
from shared.request_stats import request_stats
from shared.settings import Settings, get_settings
from shared.version import VERSION

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
DOCUMENT_PATH = f"{API}/openapi.json"
PUBLIC_ENDPOINTS = (None, "document", "docs", "metrics")
PUBLIC_BLUEPRINTS = ("probes", "root_probes", "swagger", "studio")
"""Only these need no API key."""
PROBES = ("probes", "root_probes")


def create_app(settings: Settings | None = None) -> DocumentedApp:
    """Create the WSGI application. It opens connections only when a request first needs them."""
    settings = settings or get_settings()
    bound_waits(settings.api.database_timeout_s)
    app = DocumentedApp(
        __name__,
        info=Info(
            title="Afterimage",
            version=VERSION,
            description="Generates images from a prompt and the nearest images of a corpus.",
        ),
        servers=[Server(url=settings.api.path_prefix)] if settings.api.path_prefix else None,
        security_schemes={"apiKey": {"type": "http", "scheme": "bearer"}},
        doc_ui=False,
        static_folder=None,
    )
    app.request_class = multipart.StrictRequest
    app.config.update(
        MAX_CONTENT_LENGTH=settings.api.max_body_bytes,
        MAX_FORM_PARTS=settings.api.max_upload_files + 64,
    )
    app.extensions["decoder"] = UploadDecoder(settings.api)

    for resource in (
        generation,
        bulks,
        search,
        collections,
        images,
        jobs,
        outputs,
        reference_images,
        webhooks,
        service,
        admin,
        probes,
    ):
        app.register_api(resource)
    app.register_blueprint(probes, name="root_probes", url_prefix="/")
    app.add_url_rule(DOCUMENT_PATH, "document", lambda: app.api_doc)
    app.add_url_rule("/metrics", "metrics", _metrics)
    if settings.security.docs_enabled:
        app.register_blueprint(SwaggerUI.register(doc_url=settings.api.path_prefix + DOCUMENT_PATH), url_prefix="/docs")
        app.add_url_rule("/docs", "docs", lambda: redirect(url_for("swagger.swagger")))

    problems.register(app)
    app.before_request(_start_request)
    app.before_request(make_redirect_relative)
    app.before_request(_authenticate)
    app.before_request(lambda: requests.refuse_encoded_body(request))
    rate_limits.register(app, settings)
    browser_security.register(app, settings)
    if settings.security.studio_enabled:
        studio.register(app)
    app.after_request(_finish_request)
    limited = ConcurrencyMiddleware(app.wsgi_app, settings.api)
    app.wsgi_app = PathPrefixMiddleware(limited, settings.api.path_prefix)  # type: ignore[method-assign] # as Flask documents it
    return app


def served_app() -> DocumentedApp:
    """Create the application in a worker process of granian, with logging and shutdown handlers."""
    settings = get_settings()
    configure_logging(settings, "api")
    tracing.start(settings, "api")
    job_stream.close_streams_on_signal()
    end_with_parent()
    close_at_exit()
    return create_app(settings)


def _start_request() -> None:
    sent = request.headers.get("X-Request-ID", "")
    g.request_id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
    g.started = time.monotonic()
    clear_contextvars()
    bind_contextvars(request_id=g.request_id)
    g.trace = _request_span()
    g.trace.__enter__()
    metrics.API_REQUESTS_ACTIVE.inc()


def _request_span() -> AbstractContextManager[None]:
    """The span of this request; probes have none. Its query is left out, because it may hold a prompt."""
    route = request.url_rule.rule if request.url_rule else "unknown"
    if not tracing.is_on() or request.blueprint in PROBES or request.endpoint == "metrics":
        return nullcontext()
    continues = get_settings().traces.continue_requests
    sent = tracing.read_context({"traceparent": request.headers.get("traceparent")}) if continues else None
    attributes = {"http.request.method": request.method, "http.route": route}
    return tracing.span(f"{request.method} {route}", attributes, kind="server", within=sent, root=True)


def _authenticate() -> None:
    """Set `g.caller`, unless the request is public."""
    if request.method == "OPTIONS":
        return  # Flask answers it without calling a route, CORS preflights included
    if request.endpoint not in PUBLIC_ENDPOINTS and request.blueprint not in PUBLIC_BLUEPRINTS:
        g.caller = authenticate(request)


def _finish_request(response: Response) -> Response:
    response.headers["X-Request-ID"] = g.request_id
    # The rule, not the path: ids in paths would make a metric series each.
    route = request.url_rule.rule if request.url_rule else "unknown"
    method, path, started, status = request.method, request.path, g.started, response.status_code
    trace: AbstractContextManager[None] = g.trace
    caller: Caller | None = g.get("caller")
    caller_fields = (
        {} if caller is None else {"owner_id": str(caller.owner_id), "key_id": caller.key_id and str(caller.key_id)}
    )
    error_fields = {"code": g.problem_code} if "problem_code" in g else {}

    def record_request() -> None:
        seconds = time.monotonic() - started
        metrics.API_REQUESTS_ACTIVE.dec()
        metrics.API_REQUESTS.labels(method=method, route=route, status=str(status)).inc()
        metrics.observe_duration(metrics.API_REQUEST_DURATION, seconds, {"method": method, "route": route})
        request_stats().add(status=status, seconds=seconds)
        fields = {"method": method, "path": path, "route": route, "status": status, "seconds": round(seconds, 4)}
        logger.info("request", extra=fields | caller_fields | error_fields)
        error_type = error_fields.get("code", "server_error") if status >= 500 else None
        tracing.annotate({"http.response.status_code": status, "error.type": error_type})
        trace.__exit__(None, None, None)

    # A stream ends long after this function returns.
    response.call_on_close(record_request)
    return response


def _metrics() -> Response:
    text, content_type = metrics.render()
    return Response(text, content_type=content_type)
