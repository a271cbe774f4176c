"""The OpenAPI document: flask_openapi3 derives it from the routes; this module adds errors, headers and links."""

import threading
from http import HTTPStatus
from typing import Any

from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.openapi import OpenAPI

from api_service.http import headers
from api_service.http.blueprint import ApiBlueprint
from api_service.http.problems import MEDIA_TYPE
from api_service.openapi import schemas
from api_service.openapi.links import response_links
from api_service.openapi.schemas import SCHEMA_REF_PREFIX
from api_service.routes.bulks import JSON_LINES
from shared.contracts.common import ImageFormat
from shared.contracts.images import UploadFields
from shared.contracts.search import SearchRequest

RESPONSE_REF_PREFIX = "#/components/responses/"

ERROR_RESPONSES = {
    HTTPStatus.BAD_REQUEST: ("BadRequest", "The request cannot be read: `malformed_body`, `invalid_cursor`."),
    HTTPStatus.UNAUTHORIZED: ("Unauthorized", "A valid API key is needed: `Authorization: Bearer ...`."),
    HTTPStatus.FORBIDDEN: ("Forbidden", "The API key lacks the scope that this operation needs."),
    HTTPStatus.NOT_FOUND: ("NotFound", "No resource has this id, or it belongs to another owner."),
    HTTPStatus.CONFLICT: (
        "Conflict",
        "The resource's state does not allow this: `job_state_conflict`, `bulk_offset_mismatch`.",
    ),
    HTTPStatus.REQUEST_TIMEOUT: ("Timeout", "The body arrived too slowly: `request_timeout`."),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: ("TooLarge", "The body, or an image in it, is over the limit."),
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: ("UnsupportedMediaType", "The body, or a file in it, has the wrong type."),
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: (
        "RangeNotSatisfiable",
        "The file has none of the requested bytes: `range_not_satisfiable`.",
    ),
    HTTPStatus.UNPROCESSABLE_ENTITY: (
        "Invalid",
        "The request is not valid; `errors` names each wrong field of `validation_failed`.",
    ),
    HTTPStatus.TOO_MANY_REQUESTS: (
        "TooMany",
        "The key has reached its limit of requests per minute (`rate_limited`), or its owner has reached another limit "
        "(`owner_queue_full`, `quota_exceeded`, `bulk_quota_exceeded`); try again after `Retry-After`.",
    ),
    HTTPStatus.INTERNAL_SERVER_ERROR: ("InternalError", "Something went wrong inside the service."),
    HTTPStatus.SERVICE_UNAVAILABLE: (
        "Unavailable",
        "A component that this needs is unavailable; try again after `Retry-After`.",
    ),
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

BINARY_SCHEMA = {"type": "string", "format": "binary"}
FILE_MEDIA_TYPES = {
    "getImageContent": [image_format.media_type for image_format in ImageFormat],
    "getGenerationContent": [image_format.media_type for image_format in ImageFormat],
    "getReferenceImageContent": [image_format.media_type for image_format in ImageFormat],
    "getImageThumbnail": [ImageFormat.WEBP.media_type],
    "getGenerationThumbnail": [ImageFormat.WEBP.media_type],
    "getReferenceImageThumbnail": [ImageFormat.WEBP.media_type],
}
OPERATIONS_WITHOUT_KEY = ("getHealth", "getLiveness", "getReadiness")
OPERATIONS_WITH_CONFLICT = (
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


_describing = threading.Lock()
"""Applications of one process share their blueprints, and threads share an application."""


class DocumentedApp(OpenAPI):
    """The Flask application with its OpenAPI document.

    flask_openapi3 knows models and routes. This class adds error responses, which all operations share as components,
    multipart bodies, and responses that are files or streams.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._resources: list[ApiBlueprint] = []

    def register_api(self, api: APIBlueprint, **options: Any) -> None:
        super().register_api(api, **options)
        assert isinstance(api, ApiBlueprint)
        self._resources.append(api)

    @property
    def api_doc(self) -> dict[str, Any]:
        """The document. The first request for it makes it."""
        with _describing:
            return super().api_doc

    def generate_spec_json(self) -> None:
        for resource in self._resources:
            resource.describe()
            self.tags += [tag for tag in resource.tags if tag.name not in self.tag_names]
            self.tag_names += [tag.name for tag in resource.tags]
            self.paths.update(resource.paths)
            self.components_schemas.update(resource.components_schemas)
        super().generate_spec_json()  # type: ignore[no-untyped-call]
        document = self.spec_json
        components = document["components"]
        schemas.add_unnamed_schemas(components["schemas"])
        components["schemas"] = schemas.with_nullable_types(components["schemas"])
        components["responses"] = {
            name: _error_response(status, text) for status, (name, text) in ERROR_RESPONSES.items()
        }
        components["headers"] = headers.HEADER_COMPONENTS
        for route, path_item in document["paths"].items():
            for method, operation in path_item.items():
                _complete_operation(operation, route)
                _add_headers(operation, method)
                _add_links(operation)


def _error_response(status: HTTPStatus, description: str) -> dict[str, Any]:
    return {
        "description": description,
        "headers": headers.error_headers(status),
        "content": {MEDIA_TYPE: {"schema": {"$ref": f"{SCHEMA_REF_PREFIX}Problem"}}},
    }


def _add_headers(operation: dict[str, Any], method: str) -> None:
    name = operation["operationId"]
    for status, response in operation["responses"].items():
        if "$ref" not in response:
            response["headers"] = headers.success_headers(
                name, method, status, is_file=name in FILE_MEDIA_TYPES, needs_key=name not in OPERATIONS_WITHOUT_KEY
            )


def _add_links(operation: dict[str, Any]) -> None:
    for status, response in operation["responses"].items():
        if links := response_links(operation["operationId"], status):
            response["links"] = links


def _complete_operation(operation: dict[str, Any], route: str) -> None:
    name = operation["operationId"]
    if "description" in operation:  # flask_openapi3 joins lines with <br/>, but the description is CommonMark
        operation["description"] = operation["description"].replace("<br/>", "\n").strip()
    for parameter in operation.get("parameters", ()):
        parameter["schema"] = schemas.without_null(parameter["schema"])
    if name not in OPERATIONS_WITHOUT_KEY:
        operation["security"] = [{"apiKey": []}]
    responses = operation["responses"]
    responses.pop("422")  # flask_openapi3 describes its own format, which this API does not use
    if name in FILE_MEDIA_TYPES:
        content = {media_type: {"schema": BINARY_SCHEMA} for media_type in FILE_MEDIA_TYPES[name]}
        responses["200"] = {"description": "The file.", "content": content}
        responses["206"] = {"description": "The range of the file that the request names.", "content": content}
        operation["parameters"] = [*operation["parameters"], _RANGE, _IF_RANGE]
        responses["304"] = {"description": "The client already has this version."}
    match name:
        case "generate" | "ragGenerate":
            responses["200"] = {
                "description": "The ended job after `Prefer: wait`, or the resolved request of a `dry_run`.",
                "content": {"application/json": {"schema": {"$ref": f"{SCHEMA_REF_PREFIX}SubmitAnswer"}}},
            }
            operation["parameters"] = [*operation.get("parameters", []), _PREFER, _IDEMPOTENCY_KEY]
            if name == "ragGenerate":
                operation["requestBody"] = {
                    "required": True,
                    "content": {
                        "application/json": {"schema": {"$ref": f"{SCHEMA_REF_PREFIX}RagGenerateRequest"}},
                        "multipart/form-data": _RAG_GENERATE_FORM,
                    },
                }
        case "replayGeneration" | "retryJob":
            responses["200"] = {
                "description": "The ended job after `Prefer: wait`.",
                "content": {"application/json": {"schema": {"$ref": f"{SCHEMA_REF_PREFIX}JobView"}}},
            }
            operation["parameters"] = [*operation["parameters"], _PREFER, _IDEMPOTENCY_KEY]
        case "rememberGeneration":
            operation["requestBody"]["required"] = False
            operation["parameters"] = [*operation["parameters"], _IDEMPOTENCY_KEY]
        case "getJob":
            operation["parameters"].append(_PREFER)
        case "streamJobEvents":
            responses["200"] = {
                "description": "The stream.",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            }
            responses["204"] = {"description": "The job has ended, and no event is left to send."}
            operation["parameters"].append(_LAST_EVENT_ID)
        case "createBulk" | "appendBulkLines":
            operation["requestBody"] = {"content": dict.fromkeys(JSON_LINES, _BULK_LINES)}
            if name == "createBulk":
                operation["parameters"] = [*operation["parameters"], _IDEMPOTENCY_KEY]
        case "getBulkManifest":
            responses["200"] = {"description": "The lines.", "content": {JSON_LINES[0]: _MANIFEST}}
        case "getBulkArchive":
            responses["200"] = {
                "description": "The archive.",
                "content": {"application/x-tar": {"schema": BINARY_SCHEMA}},
            }
        case "uploadImages":
            operation["requestBody"] = {"required": True, "content": {"multipart/form-data": _upload_form()}}
        case "search":
            operation["requestBody"] = {
                "required": True,
                "content": {
                    "application/json": {"schema": {"$ref": f"{SCHEMA_REF_PREFIX}SearchRequest"}},
                    "multipart/form-data": _search_form(),
                },
            }
    if name in EXAMPLES:
        operation["requestBody"]["content"]["application/json"]["example"] = EXAMPLES[name]
    for status in _error_statuses(operation, route):
        responses.setdefault(str(int(status)), {"$ref": RESPONSE_REF_PREFIX + ERROR_RESPONSES[status][0]})
    responses.setdefault("default", {"$ref": f"{RESPONSE_REF_PREFIX}InternalError"})


def _error_statuses(operation: dict[str, Any], route: str) -> list[HTTPStatus]:
    statuses = [HTTPStatus.INTERNAL_SERVER_ERROR]
    if operation["operationId"] != "getLiveness":
        statuses.append(HTTPStatus.SERVICE_UNAVAILABLE)
    if operation["operationId"] not in OPERATIONS_WITHOUT_KEY:
        statuses += [HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS]
    if operation.get("parameters") or operation.get("requestBody"):
        statuses += [HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY]
    if "{" in route:
        statuses.append(HTTPStatus.NOT_FOUND)
    if operation.get("requestBody"):
        statuses += [HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNSUPPORTED_MEDIA_TYPE]
    if operation["operationId"] in FILE_MEDIA_TYPES:
        statuses.append(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
    if operation["operationId"] in OPERATIONS_WITH_CONFLICT:
        statuses.append(HTTPStatus.CONFLICT)
    return statuses


_RANGE = {
    "name": "Range",
    "in": "header",
    "schema": {"type": "string"},
    "description": "one range of the file's bytes (RFC 9110); several ranges get the whole file",
    "example": "bytes=0-99",
}
_IF_RANGE = {
    "name": "If-Range",
    "in": "header",
    "schema": {"type": "string"},
    "description": "the `ETag` of the version whose range is wanted; of another version the whole file is sent",
    "example": '"5d41402abc4b2a76b9719d911017c592"',
}
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
    "description": "a repeated request with the same key gets the answer of the first one",
    "example": "order-17",
}
_BULK_LINES = {
    "schema": {
        "type": "string",
        "description": "JSON Lines: each line is a `BulkRagGenerateItem` or a `BulkGenerateItem`; the first line may "
        "be a `BulkHeader`",
    },
    "example": '{"bulk": {"on_invalid": "skip", "defaults": {"num_images": 2}}}\n'
    '{"prompt": "a red apple", "custom_id": "apple"}\n'
    '{"prompt": "a green pear", "kind": "generate", "seed": 7}\n',
}
_MANIFEST = {
    "schema": {
        **BINARY_SCHEMA,  # generated clients treat only `text/...` as text, and this is a download
        "description": 'JSON Lines: each line is a `BulkManifestLine`; the last one is `{"end": true, "items": N}`',
    }
}
_LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "schema": {"type": "integer", "minimum": 0},
    "description": "only events with a higher number",
}


_RAG_GENERATE_FORM = {
    "schema": {
        "type": "object",
        "properties": {
            "request": {
                "type": "object",
                "description": "a `RagGenerateRequest`; its `reference_images` have no `data`, and may be left out",
            },
            "reference_image": {
                "type": "array",
                "items": BINARY_SCHEMA,
                "maxItems": 16,
                "description": "PNG, JPEG, WebP or AVIF; may be repeated",
            },
        },
        "required": ["request"],
    },
    "encoding": {"request": {"contentType": "application/json"}},
}


def _upload_form() -> dict[str, Any]:
    fields = schemas.form_fields(UploadFields)
    files = {
        "type": "array",
        "items": BINARY_SCHEMA,
        "minItems": 1,
        "description": "PNG, JPEG, WebP or AVIF; may be repeated",
    }
    return {
        "schema": {"type": "object", "properties": {"file": files} | fields, "required": ["file"]},
        "encoding": {name: {"contentType": "application/json"} for name in ("attributes", "each")},
    }


def _search_form() -> dict[str, Any]:
    fields = schemas.form_fields(SearchRequest)
    return {
        "schema": {"type": "object", "properties": fields | {"image": BINARY_SCHEMA}},
        "encoding": {name: {"contentType": "application/json"} for name in ("filter", "mix", "negative")},
    }
