"""A typed client of the service. It needs neither torch nor the code of the server.

from afterimage_client import Afterimage

with Afterimage("http://127.0.0.1:8000") as service:
    for picture in service.run("a red apple with a bite", num_images=2, seed=7):
        picture.save(f"out/{picture.output.seed}.png")

`AsyncAfterimage` has the same methods for asyncio. `afterimage` on the command line has the common ones.
"""

from afterimage_client.asynchronous import AsyncAfterimage
from afterimage_client.bulks import BulkMismatchError, header_line
from afterimage_client.client import Afterimage
from afterimage_client.errors import (
    AfterimageError,
    AuthenticationError,
    ConflictError,
    CorruptDownloadError,
    IdempotencyKeyReusedError,
    InvalidInputError,
    InvalidRequestError,
    JobFailedError,
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
from afterimage_client.picture import Picture
from afterimage_client.requests import Reference
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
from shared.contracts.outputs import OutputPatch, RememberRequest
from shared.contracts.records import Provenance, Resolution
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
    "AsyncAfterimage",
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
    "InvalidInputError",
    "InvalidRequestError",
    "ItemState",
    "JobFailedError",
    "JobKind",
    "JobState",
    "JobView",
    "Lane",
    "Mode",
    "Neighbour",
    "NotFoundError",
    "OnInvalid",
    "OutputPatch",
    "OutputView",
    "PermissionDeniedError",
    "Picture",
    "PinnedReference",
    "Preview",
    "ProblemError",
    "Progress",
    "Provenance",
    "QueryPart",
    "QueueFullError",
    "RagGenerateRequest",
    "RagSearchQuery",
    "RagSearchResponse",
    "RateLimitedError",
    "Reference",
    "ReferenceImageView",
    "RememberRequest",
    "Replay",
    "ReplayVerdict",
    "Resolution",
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
