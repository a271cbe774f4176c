"""The OpenAPI document: what flask_openapi3 finds in the routes, made whole."""

from http import HTTPStatus
from typing import Any

from flask_openapi3.openapi import OpenAPI

from api_service.http import headers
from api_service.http.problems import MEDIA_TYPE
from api_service.openapi import links as document_links
from api_service.openapi import schemas
from api_service.openapi.schemas import SCHEMAS
from api_service.routes.bulks import JSON_LINES
from shared.contracts.common import ImageFormat
from shared.contracts.images import UploadFields
from shared.contracts.search import SearchRequest

RESPONSES = "#/components/responses/"

ERRORS = {
    HTTPStatus.BAD_REQUEST: ("BadRequest", "The request cannot be read: `malformed_body`, `invalid_cursor`."),
    HTTPStatus.UNAUTHORIZED: ("Unauthorized", "A valid API key is needed: `Authorization: Bearer ...`."),
    HTTPStatus.FORBIDDEN: ("Forbidden", "The API key lacks the scope that this needs."),
    HTTPStatus.NOT_FOUND: ("NotFound", "There is nothing under that id, or it is somebody else's."),
    HTTPStatus.CONFLICT: (
        "Conflict",
        "The state it is in does not allow this: `job_state_conflict`, `bulk_offset_mismatch`.",
    ),
    HTTPStatus.REQUEST_TIMEOUT: ("Timeout", "The body came too slowly: `request_timeout`."),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: ("TooLarge", "The body, or an image in it, is over the limit."),
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: ("UnsupportedMediaType", "The body, or a file in it, has the wrong type."),
    HTTPStatus.UNPROCESSABLE_ENTITY: (
        "Invalid",
        "The request makes no sense here; `errors` names each wrong field of `validation_failed`.",
    ),
    HTTPStatus.TOO_MANY_REQUESTS: (
        "TooMany",
        "The key has sent as many requests as it may in a minute (`rate_limited`), or its owner has reached a cap or a "
        "quota (`owner_queue_full`, `quota_exceeded`, `bulk_quota_exceeded`); try again after `Retry-After`.",
    ),
    HTTPStatus.INTERNAL_SERVER_ERROR: ("InternalError", "Something went wrong inside the service."),
    HTTPStatus.SERVICE_UNAVAILABLE: ("Unavailable", "A part that is needed is away; try again after `Retry-After`."),
}

EXAMPLES: dict[str, Any] = {
    "search": {"query": "a cat playing", "k": 5, "threshold": 0.7},
    "generate": {"prompt": "a red apple with a bite", "num_images": 2, "seed": 7, "format": "png"},
    "ragGenerate": {
        "prompt": "a cat playing with a ball",
        "num_images": 2,
        "similar_examples_count": 3,
        "width": 512,
        "height": 512,
        "format": "png",
    },
    "changeImage": {"caption": "a green pear", "tags": ["fruit", "green"]},
}

BINARY = {"type": "string", "format": "binary"}
FILES = {
    "getImageContent": [image_format.media_type for image_format in ImageFormat],
    "getGenerationContent": [image_format.media_type for image_format in ImageFormat],
    "getImageThumbnail": [ImageFormat.WEBP.media_type],
    "getGenerationThumbnail": [ImageFormat.WEBP.media_type],
}
OPEN = ("getHealth", "getLiveness", "getReadiness")
STATE_CHANGES = (
    "cancelJob",
    "retryJob",
    "deleteJob",
    "createBulk",
    "appendBulkLines",
    "completeBulk",
    "pauseBulk",
    "resumeBulk",
    "cancelBulk",
    "retryFailedBulkItems",
)


class Documented(OpenAPI):
    """The application with its document.

    flask_openapi3 knows models and routes. Here come what it cannot know: the errors, which are the same everywhere
    and stand once among the components; multipart bodies; answers that are files or streams.
    """

    def generate_spec_json(self) -> None:
        super().generate_spec_json()  # type: ignore[no-untyped-call]
        document = self.spec_json
        components = document["components"]
        schemas.complete(components["schemas"])
        components["schemas"] = schemas.folded(components["schemas"])
        components["responses"] = {name: _error(status, text) for status, (name, text) in ERRORS.items()}
        components["headers"] = headers.COMPONENTS
        for route, path_item in document["paths"].items():
            for method, operation in path_item.items():
                _complete(operation, route)
                _add_headers(operation, method)
                _add_links(operation)


def _error(status: HTTPStatus, description: str) -> dict[str, Any]:
    return {
        "description": description,
        "headers": headers.of_error(status),
        "content": {MEDIA_TYPE: {"schema": {"$ref": f"{SCHEMAS}Problem"}}},
    }


def _add_headers(operation: dict[str, Any], method: str) -> None:
    name = operation["operationId"]
    for status, response in operation["responses"].items():
        if "$ref" not in response:
            response["headers"] = headers.of_success(
                name, method, status, is_file=name in FILES, needs_key=name not in OPEN
            )


def _add_links(operation: dict[str, Any]) -> None:
    for status, response in operation["responses"].items():
        if links := document_links.of_answer(operation["operationId"], status):
            response["links"] = links


def _complete(operation: dict[str, Any], route: str) -> None:
    name = operation["operationId"]
    if "description" in operation:  # flask_openapi3 joins a docstring's lines by <br/>, which is no CommonMark
        operation["description"] = operation["description"].replace("<br/>", "\n").strip()
    for parameter in operation.get("parameters", ()):
        parameter["schema"] = schemas.without_null(parameter["schema"])
    if name not in OPEN:
        operation["security"] = [{"apiKey": []}]
    responses = operation["responses"]
    responses.pop("422")  # flask_openapi3's own, in a format that is not ours
    if name in FILES:
        responses["200"] = {
            "description": "The file.",
            "content": {media_type: {"schema": BINARY} for media_type in FILES[name]},
        }
        responses["304"] = {"description": "The client has it already."}
    match name:
        case "generate" | "ragGenerate":
            responses["200"] = {
                "description": "The ended job after `Prefer: wait`, or what a `dry_run` would run.",
                "content": {"application/json": {"schema": {"$ref": f"{SCHEMAS}SubmitAnswer"}}},
            }
            operation["parameters"] = [*operation.get("parameters", []), _PREFER, _IDEMPOTENCY_KEY]
        case "replayGeneration":
            responses["200"] = {
                "description": "The ended job after `Prefer: wait`.",
                "content": {"application/json": {"schema": {"$ref": f"{SCHEMAS}JobView"}}},
            }
            operation["parameters"] = [*operation["parameters"], _PREFER, _IDEMPOTENCY_KEY]
        case "getJob":
            operation["parameters"].append(_PREFER)
        case "streamJobEvents":
            responses["200"] = {
                "description": "The stream.",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            }
            responses["204"] = {"description": "The job has ended and everything was told."}
            operation["parameters"].append(_LAST_EVENT_ID)
        case "createBulk" | "appendBulkLines":
            operation["requestBody"] = {"content": dict.fromkeys(JSON_LINES, _LINES)}
            if name == "createBulk":
                operation["parameters"] = [*operation["parameters"], _IDEMPOTENCY_KEY]
        case "getBulkManifest":
            responses["200"] = {"description": "The lines.", "content": {JSON_LINES[0]: _MANIFEST}}
        case "getBulkArchive":
            responses["200"] = {"description": "The archive.", "content": {"application/x-tar": {"schema": BINARY}}}
        case "uploadImages":
            operation["requestBody"] = {"required": True, "content": {"multipart/form-data": _upload_form()}}
        case "search":
            operation["requestBody"] = {
                "required": True,
                "content": {
                    "application/json": {"schema": {"$ref": f"{SCHEMAS}SearchRequest"}},
                    "multipart/form-data": _search_form(),
                },
            }
    if name in EXAMPLES:
        operation["requestBody"]["content"]["application/json"]["example"] = EXAMPLES[name]
    for status in _errors_of(operation, route):
        responses.setdefault(str(int(status)), {"$ref": RESPONSES + ERRORS[status][0]})
    responses.setdefault("default", {"$ref": f"{RESPONSES}InternalError"})


def _errors_of(operation: dict[str, Any], route: str) -> list[HTTPStatus]:
    statuses = [HTTPStatus.INTERNAL_SERVER_ERROR]
    if operation["operationId"] != "getLiveness":
        statuses.append(HTTPStatus.SERVICE_UNAVAILABLE)
    if operation["operationId"] not in OPEN:
        statuses += [HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS]
    if operation.get("parameters") or operation.get("requestBody"):
        statuses += [HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY]
    if "{" in route:
        statuses.append(HTTPStatus.NOT_FOUND)
    if operation.get("requestBody"):
        statuses += [HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNSUPPORTED_MEDIA_TYPE]
    if operation["operationId"] in STATE_CHANGES:
        statuses.append(HTTPStatus.CONFLICT)
    return statuses


_PREFER = {
    "name": "Prefer",
    "in": "header",
    "schema": {"type": "string"},
    "description": "`wait=N`: wait up to N seconds for the end of the job (RFC 7240)",
    "example": "wait=20",
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": "a repeated request with the same key gets the first one's answer",
    "example": "order-17",
}
_LINES = {
    "schema": {
        "type": "string",
        "description": "JSON Lines: each line a `BulkRagGenerateItem` or a `BulkGenerateItem`, the first one perhaps a "
        "`BulkHeader`",
    },
    "example": '{"bulk": {"on_invalid": "skip", "defaults": {"num_images": 2}}}\n'
    '{"prompt": "a red apple", "custom_id": "apple"}\n'
    '{"prompt": "a green pear", "kind": "generate", "seed": 7}\n',
}
_MANIFEST = {
    "schema": {
        **BINARY,  # a download: generated clients read text as text only where its type begins with `text/`
        "description": 'JSON Lines: each line a `BulkManifestLine`; the last one is `{"end": true, "items": N}`',
    }
}
_LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "schema": {"type": "integer", "minimum": 0},
    "description": "only events later than this",
}


def _upload_form() -> dict[str, Any]:
    fields = schemas.form_fields(UploadFields)
    files = {"type": "array", "items": BINARY, "minItems": 1, "description": "PNG, JPEG or WebP; repeatable"}
    return {
        "schema": {"type": "object", "properties": {"file": files} | fields, "required": ["file"]},
        "encoding": {name: {"contentType": "application/json"} for name in ("attributes", "each")},
    }


def _search_form() -> dict[str, Any]:
    fields = schemas.form_fields(SearchRequest)
    return {
        "schema": {"type": "object", "properties": fields | {"image": BINARY}},
        "encoding": {"filter": {"contentType": "application/json"}},
    }
