"""A typed client of the service. It needs neither torch nor the code of the server.

from pathlib import Path
from afterimage_client import Afterimage, RagGenerateRequest

with Afterimage("http://127.0.0.1:8000") as service:
    job = service.jobs.submit(RagGenerateRequest(prompt="a red apple with a bite", seed=7))
    job = service.jobs.wait(job, on_update=print)

    for output in job.outputs:
        service.outputs.download(output, Path(f"out/{output.seed}.{output.format}"))
"""

from afterimage_client.bulks import BulkMismatchError, header_line
from afterimage_client.client import Afterimage
from afterimage_client.errors import (
    AfterimageError,
    AuthenticationError,
    ConflictError,
    CorruptDownloadError,
    IdempotencyKeyReusedError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    ProblemError,
    QueueFullError,
    RateLimitedError,
    ServerError,
    TooManyStreamsError,
    UnavailableError,
    UnreachableError,
    WaitTimeoutError,
    WithdrawnError,
)
from afterimage_client.images import ImageFile
from afterimage_client.jobs import Update
from shared.contracts.bulks import BulkItemView, BulkOptions, BulkState, BulkView, ItemState
from shared.contracts.collections import (
    Access,
    CollectionDefaults,
    CollectionPatch,
    CollectionView,
    GrantedAccess,
    GrantView,
)
from shared.contracts.common import OnInvalid
from shared.contracts.generation import (
    GenerateRequest,
    Mode,
    PinnedReference,
    RagGenerateRequest,
    SentReferenceImage,
)
from shared.contracts.images import (
    FileOutcome,
    ImageDescription,
    ImagePatch,
    ImageState,
    ImageView,
    UploadedFile,
    UploadFields,
    UploadResponse,
    WithdrawalView,
)
from shared.contracts.jobs import (
    EventView,
    JobKind,
    JobState,
    JobView,
    Lane,
    OutputView,
    Preview,
    Progress,
    ReferenceImageView,
    Replay,
    ReplayVerdict,
    WithdrawnView,
)
from shared.contracts.outputs import RememberRequest
from shared.contracts.search import (
    Concept,
    FoundBy,
    ImageFilter,
    Neighbour,
    QueryPart,
    RagSearchQuery,
    RagSearchResponse,
    SearchMode,
    SearchRequest,
    SearchResponse,
)

__all__ = [
    "Access",
    "Afterimage",
    "AfterimageError",
    "AuthenticationError",
    "BulkItemView",
    "BulkMismatchError",
    "BulkOptions",
    "BulkState",
    "BulkView",
    "CollectionDefaults",
    "CollectionPatch",
    "CollectionView",
    "Concept",
    "ConflictError",
    "CorruptDownloadError",
    "EventView",
    "FileOutcome",
    "FoundBy",
    "GenerateRequest",
    "GrantView",
    "GrantedAccess",
    "IdempotencyKeyReusedError",
    "ImageDescription",
    "ImageFile",
    "ImageFilter",
    "ImagePatch",
    "ImageState",
    "ImageView",
    "InvalidRequestError",
    "ItemState",
    "JobKind",
    "JobState",
    "JobView",
    "Lane",
    "Mode",
    "Neighbour",
    "NotFoundError",
    "OnInvalid",
    "OutputView",
    "PermissionDeniedError",
    "PinnedReference",
    "Preview",
    "ProblemError",
    "Progress",
    "QueryPart",
    "QueueFullError",
    "RagGenerateRequest",
    "RagSearchQuery",
    "RagSearchResponse",
    "RateLimitedError",
    "ReferenceImageView",
    "RememberRequest",
    "Replay",
    "ReplayVerdict",
    "SearchMode",
    "SearchRequest",
    "SearchResponse",
    "SentReferenceImage",
    "ServerError",
    "TooManyStreamsError",
    "UnavailableError",
    "UnreachableError",
    "Update",
    "UploadFields",
    "UploadResponse",
    "UploadedFile",
    "WaitTimeoutError",
    "WithdrawalView",
    "WithdrawnError",
    "WithdrawnView",
    "header_line",
]
