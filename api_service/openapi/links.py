"""What may be done next with what an answer holds, as links of the OpenAPI document: from an id to its operations."""

from typing import Any

FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "job_id": ("getJob", "streamJobEvents", "cancelJob", "retryJob", "deleteJob", "listWebhookDeliveries"),
    "generation_id": (
        "getGeneration",
        "getGenerationContent",
        "getGenerationThumbnail",
        "replayGeneration",
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
"""The operations that take an id, by the name of their parameter."""

_JOB = {"job_id": "/id", "generation_id": "/outputs/0/id"}
_BULK = {"bulk_id": "/id"}
_IMAGE = {"image_id": "/id"}
_UPLOADED = {"image_id": "/images/0/id"}
HOLDS: dict[tuple[str, str], dict[str, str]] = {
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
    ("uploadImages", "200"): _UPLOADED,
    ("uploadImages", "201"): _UPLOADED,
    ("getImage", "200"): _IMAGE,
    ("changeImage", "200"): _IMAGE,
    ("listImages", "200"): {"image_id": "/items/0/id"},
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
    # Not from lists of owners and keys: who tries every link would end its own.
    ("makeOwner", "200"): {"owner_id": "/id"},
    ("makeKey", "201"): {"key_id": "/key/id"},
    ("rotateKey", "201"): {"key_id": "/key/id"},
}
"""Where an answer, by operation and status, holds ids: JSON pointers into its body."""


def of_answer(operation_id: str, status: str) -> dict[str, dict[str, Any]]:
    """The links of one answer, by the operation that each leads to."""
    return {
        follow_up: _link(follow_up, parameter, pointer)
        for parameter, pointer in HOLDS.get((operation_id, status), {}).items()
        for follow_up in FOLLOW_UPS[parameter]
    }


def _link(operation_id: str, parameter: str, pointer: str) -> dict[str, Any]:
    parameters = {parameter: f"$response.body#{pointer}"}
    if operation_id == "appendBulkLines":  # it goes on where the bulk is
        parameters["from_line"] = f"$response.body#{pointer.rpartition('/')[0]}/received_lines"
    return {"operationId": operation_id, "parameters": parameters}
