"""Links of the OpenAPI document: from each id in a response to the operations that take it."""

from typing import Any

OPERATIONS_BY_PARAMETER: dict[str, tuple[str, ...]] = {
    "job_id": ("getJob", "streamJobEvents", "cancelJob", "retryJob", "deleteJob", "listWebhookDeliveries"),
    "generation_id": (
        "getGeneration",
        "changeGeneration",
        "getGenerationContent",
        "getGenerationThumbnail",
        "replayGeneration",
        "rememberGeneration",
        "deleteGeneration",
    ),
    "image_id": (
        "getImage",
        "getImageContent",
        "getImageThumbnail",
        "listGenerationsOfImage",
        "changeImage",
        "deleteImage",
    ),
    "reference_id": ("getReferenceImageContent", "getReferenceImageThumbnail"),
    "collection_id": ("getCollection", "changeCollection", "deleteCollection", "listGrants"),
    "grant": ("shareCollection", "unshareCollection"),
    "bulk_id": (
        "getBulk",
        "appendBulkLines",
        "completeBulk",
        "listBulkItems",
        "listBulkErrors",
        "getBulkManifest",
        "getBulkArchive",
        "pauseBulk",
        "resumeBulk",
        "cancelBulk",
        "retryFailedBulkItems",
        "listJobs",
    ),
    "delivery_id": ("redeliverWebhook",),
    "owner_id": ("getOwner", "changeOwner", "makeKey", "listKeys"),
    "key_id": ("changeKey", "rotateKey", "revokeKey"),
}
"""Operations that take an id, by the name of their path parameter. A grant has two: see `_link`."""

_JOB = {"job_id": "/id", "generation_id": "/outputs/0/id", "reference_id": "/reference_images/0/id"}
_BULK = {"bulk_id": "/id"}
_IMAGE = {"image_id": "/id"}
_UPLOADED_IMAGE = {"image_id": "/images/0/id"}
ID_POINTERS: dict[tuple[str, str], dict[str, str]] = {
    ("generate", "202"): _JOB,
    ("ragGenerate", "202"): _JOB,
    ("retryJob", "202"): _JOB,
    ("replayGeneration", "202"): _JOB,
    ("getJob", "200"): _JOB,
    ("cancelJob", "200"): _JOB,
    ("listJobs", "200"): {"job_id": "/items/0/id", "generation_id": "/items/0/outputs/0/id"},
    ("getGeneration", "200"): {"generation_id": "/id", "job_id": "/job_id"},
    ("listGenerations", "200"): {"generation_id": "/items/0/id", "job_id": "/items/0/job_id"},
    ("listGenerationsOfImage", "200"): {"generation_id": "/items/0/id", "job_id": "/items/0/job_id"},
    ("uploadImages", "200"): _UPLOADED_IMAGE,
    ("uploadImages", "201"): _UPLOADED_IMAGE,
    ("rememberGeneration", "200"): _IMAGE,
    ("rememberGeneration", "201"): _IMAGE,
    ("getImage", "200"): _IMAGE,
    ("changeImage", "200"): _IMAGE,
    ("listImages", "200"): {"image_id": "/items/0/id"},
    ("createCollection", "201"): {"collection_id": "/id"},
    ("getCollection", "200"): {"collection_id": "/id"},
    ("changeCollection", "200"): {"collection_id": "/id"},
    ("listCollections", "200"): {"collection_id": "/items/0/id"},
    ("shareCollection", "200"): {"grant": "/collection_id"},
    ("listGrants", "200"): {"grant": "/items/0/collection_id"},
    ("search", "200"): {"image_id": "/results/0/image_id"},
    ("ragSearch", "200"): {"image_id": "/references/0/image_id"},
    ("createBulk", "202"): _BULK,
    ("appendBulkLines", "202"): _BULK,
    **{
        (name, "200"): _BULK
        for name in ("getBulk", "completeBulk", "pauseBulk", "resumeBulk", "cancelBulk", "retryFailedBulkItems")
    },
    ("listBulks", "200"): {"bulk_id": "/items/0/id"},
    ("listBulkItems", "200"): {"generation_id": "/items/0/outputs/0/id"},
    ("listWebhookDeliveries", "200"): {"delivery_id": "/items/0/id"},
    # Lists of owners and keys have no links: a client that follows every link would revoke its own key.
    ("makeOwner", "200"): {"owner_id": "/id"},
    ("makeKey", "201"): {"key_id": "/key/id"},
    ("rotateKey", "201"): {"key_id": "/key/id"},
}
"""JSON pointers to the ids in a response body, by operation and status."""


def response_links(operation_id: str, status: str) -> dict[str, dict[str, Any]]:
    """Return the links of one response, by their target operation."""
    return {
        target: _link(target, parameter, pointer)
        for parameter, pointer in ID_POINTERS.get((operation_id, status), {}).items()
        for target in OPERATIONS_BY_PARAMETER[parameter]
    }


def _link(operation_id: str, parameter: str, pointer: str) -> dict[str, Any]:
    parameters = {parameter: f"$response.body#{pointer}"}
    if parameter == "grant":  # the path has two parameters
        owner = f"$response.body#{pointer.rpartition('/')[0]}/owner"
        parameters = {"collection_id": f"$response.body#{pointer}", "owner": owner}
    if operation_id == "appendBulkLines":  # it continues after the lines that the bulk has
        parameters["from_line"] = f"$response.body#{pointer.rpartition('/')[0]}/received_lines"
    return {"operationId": operation_id, "parameters": parameters}
