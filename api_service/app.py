"""The Flask application: what is registered, and what happens around every request."""

import logging
import re
import time
import uuid

from flask import Response, g, redirect, request
from flask_openapi3.models.info import Info
from flask_openapi3_swagger.plugins import RegisterPlugin as SwaggerUI
from structlog.contextvars import bind_contextvars, clear_contextvars

from api_service import studio
from api_service.http import browser_security, problems, rate_limits
from api_service.http.auth import Caller, authenticated
from api_service.http.concurrency import Serving
from api_service.openapi.document import Documented
from api_service.routes.admin import admin
from api_service.routes.bulks import bulks
from api_service.routes.generation import generation
from api_service.routes.images import images
from api_service.routes.jobs import jobs
from api_service.routes.outputs import outputs
from api_service.routes.search import search
from api_service.routes.service import probes, service
from api_service.routes.webhooks import webhooks
from api_service.services import job_stream
from api_service.services.views import API
from shared import metrics
from shared.child_processes import end_with_parent
from shared.db.session import bound_waits
from shared.imaging import UploadDecoder
from shared.logging import configure as configure_logging
from shared.pools import close_at_exit
from shared.request_stats import request_windows
from shared.settings import Settings, get_settings
from shared.version import VERSION

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
DOCUMENT = f"{API}/openapi.json"
PUBLIC_ENDPOINTS = (None, "document", "docs", "metrics")
PUBLIC_BLUEPRINTS = ("probes", "root_probes", "swagger", "studio")


def create_app(settings: Settings | None = None) -> Documented:
    """The API as a WSGI application. Opens no connection: those come with the first request that needs them."""
    settings = settings or get_settings()
    bound_waits(settings.api.database_timeout_s)
    app = Documented(
        __name__,
        info=Info(title="Afterimage", version=VERSION, description="Generates images from what it remembers."),
        security_schemes={"apiKey": {"type": "http", "scheme": "bearer"}},
        doc_ui=False,
        static_folder=None,
    )
    app.config.update(
        MAX_CONTENT_LENGTH=settings.api.max_body_bytes,
        MAX_FORM_PARTS=settings.api.max_upload_files + 64,
    )
    app.extensions["decoder"] = UploadDecoder(settings.api)

    for resource in (generation, bulks, search, images, jobs, outputs, webhooks, service, admin, probes):
        app.register_api(resource)
    app.register_blueprint(probes, name="root_probes", url_prefix="/")
    app.add_url_rule(DOCUMENT, "document", lambda: app.api_doc)
    app.add_url_rule("/metrics", "metrics", _metrics)
    if settings.security.docs_enabled:
        app.register_blueprint(SwaggerUI.register(doc_url=DOCUMENT), url_prefix="/docs")
        app.add_url_rule("/docs", "docs", lambda: redirect("/docs/swagger"))

    problems.register(app)
    app.before_request(_begin)
    app.before_request(_authenticate)
    rate_limits.register(app, settings)
    browser_security.register(app, settings)
    if settings.security.studio_enabled:
        studio.register(app)
    app.after_request(_finish)
    app.wsgi_app = Serving(app.wsgi_app, settings.api)  # type: ignore[method-assign] # Flask's own way to wrap it
    return app


def served_app() -> Documented:
    """What granian calls in each of its worker processes."""
    settings = get_settings()
    configure_logging(settings, "api")
    job_stream.end_with_process()
    end_with_parent()
    close_at_exit()
    return create_app(settings)


def _begin() -> None:
    sent = request.headers.get("X-Request-ID", "")
    g.request_id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
    g.started = time.monotonic()
    clear_contextvars()
    bind_contextvars(request_id=g.request_id)
    metrics.API_REQUESTS_ACTIVE.inc()


def _authenticate() -> None:
    """Say on whose behalf the request acts; only what is named here is for everybody."""
    if request.method == "OPTIONS":
        return  # Flask's own answer: which methods there are, and to a browser whether its page may use them
    if request.endpoint not in PUBLIC_ENDPOINTS and request.blueprint not in PUBLIC_BLUEPRINTS:
        g.caller = authenticated(request)


def _finish(response: Response) -> Response:
    response.headers["X-Request-ID"] = g.request_id
    # The rule, not the path: one series per route, whatever ids clients ask for.
    route = request.url_rule.rule if request.url_rule else "unknown"
    method, path, started, status = request.method, request.path, g.started, response.status_code
    caller: Caller | None = g.get("caller")
    whose = {} if caller is None else {"owner_id": str(caller.owner_id), "key_id": caller.key_id and str(caller.key_id)}

    def end() -> None:
        seconds = time.monotonic() - started
        metrics.API_REQUESTS_ACTIVE.dec()
        metrics.API_REQUESTS.labels(method=method, route=route, status=str(status)).inc()
        metrics.observe_duration("api_request", seconds, {"method": method, "route": route})
        request_windows().add(status=status, seconds=seconds)
        fields = {"method": method, "path": path, "route": route, "status": status, "seconds": round(seconds, 4)}
        logger.info("request", extra=fields | whose)

    # A stream ends long after this function; its line belongs to the end.
    response.call_on_close(end)
    return response


def _metrics() -> Response:
    text, content_type = metrics.render()
    return Response(text, content_type=content_type)
