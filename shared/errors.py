"""Every failure that the code raises: one tree of exceptions, each with a stable `code` and an HTTP status.

The codes of requests that the framework refuses are in `api_service/http/problems.py`.
Clients match on `code`. The class docstring is the default message. `context` holds only data that the caller may see.
"""

from collections.abc import Mapping
from typing import Any, ClassVar


class BaseAppException(Exception):  # noqa: N818 - the public name of the tree's root
    """Something went wrong inside the service."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retry_after_s: int | None = None
    """Seconds until a retry makes sense. Most classes have a constant; a raiser may pass a better value."""

    def __init__(self, message: str | None = None, *, retry_after_s: int | None = None, **context: Any) -> None:
        self.message = message or (type(self).__doc__ or "").strip().splitlines()[0]
        self.context = context
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """The structured form stored on a failed job and sent to clients."""
        return {"code": self.code, "detail": self.message, **({"context": self.context} if self.context else {})}


class ConfigurationError(BaseAppException):
    """The configuration is wrong."""

    code = "configuration_error"


# --- database -----------------------------------------------------------------------------------------------------


class DatabaseError(BaseAppException):
    """The database failed."""

    code = "database_error"


class DatabaseConnectionError(DatabaseError):
    """The database cannot be reached."""

    code = "database_unavailable"
    status = 503
    retry_after_s = 5


class DatabaseConflictError(DatabaseConnectionError):
    """The transaction conflicted with another one, and the database ended it."""

    code = "database_conflict"
    retry_after_s = 1


class DatabaseQueryError(DatabaseError):
    """A database statement failed."""

    code = "database_query_failed"


# --- models -------------------------------------------------------------------------------------------------------


class ModelError(BaseAppException):
    """A model failed."""

    code = "model_error"


class ModelNotFoundError(ModelError):
    """No model of that name is configured."""

    code = "model_not_found"
    status = 422


class ModelLoadError(ModelError):
    """A model could not be loaded."""

    code = "model_load_failed"


class ModelOutOfMemoryError(ModelError):
    """The images do not fit in the accelerator's memory."""

    code = "out_of_memory"


class EmbeddingError(BaseAppException):
    """The embedding could not be computed."""

    code = "embedding_failed"


class EmbeddingUnavailableError(EmbeddingError):
    """No worker embedded the query in time."""

    code = "embedding_unavailable"
    status = 503
    retry_after_s = 2


class EmbeddingCrashedError(EmbeddingError):
    """The worker process crashed repeatedly while it embedded the image."""

    code = "embedding_crashed"


class ImageGenerationError(BaseAppException):
    """The image could not be generated."""

    code = "generation_failed"


class UnsupportedModeError(ImageGenerationError):
    """This model cannot condition on references in the requested mode."""

    code = "mode_not_supported"
    status = 422


class NoReferenceError(ImageGenerationError):
    """This model only edits pictures, and there is no relevant reference."""

    code = "no_reference"
    status = 422


class UnsupportedSizeError(ImageGenerationError):
    """This model cannot draw that exact size."""

    code = "size_not_supported"
    status = 422


class UnsupportedParameterError(ImageGenerationError):
    """This model does not support this scheduler, LoRA or parameter."""

    code = "parameter_not_supported"
    status = 422


class ReferenceUnavailableError(ImageGenerationError):
    """A pinned reference does not exist or is not searchable yet."""

    code = "reference_unavailable"
    status = 422


class ReferenceDeletedError(ReferenceUnavailableError):
    """A reference was deleted before the job could use it."""

    code = "reference_deleted"


class PlanInvalidError(ReferenceUnavailableError):
    """The plan was not issued to this owner by this service, or it was changed."""

    code = "plan_invalid"


class PlanExpiredError(PlanInvalidError):
    """The plan is too old. Search for a new one."""

    code = "plan_expired"


class PlanOutdatedError(PlanInvalidError):
    """An image of the plan is gone, or the service uses another embedding space. Search for a new plan."""

    code = "plan_outdated"


class PlanMismatchError(PlanInvalidError):
    """The plan was made for another prompt or another model."""

    code = "plan_mismatch"


class ContentCredentialsError(ImageGenerationError):
    """The output could not be signed."""

    code = "content_credentials_failed"


class InvalidOutputError(ImageGenerationError):
    """The model returned something that is not an image."""

    code = "invalid_output"


class EngineRefusedError(ImageGenerationError):
    """The engine that draws for this model refused the request."""

    code = "engine_refused"
    status = 422


class ContentRefusedError(EngineRefusedError):
    """The content filter of the engine that draws for this model refused the request."""

    code = "content_refused"


class PromptBlockedError(ImageGenerationError):
    """The content policy of this service does not allow this prompt."""

    code = "prompt_blocked"
    status = 422


class OutputBlockedError(ImageGenerationError):
    """The content policy of this service withheld every image of the job."""

    code = "output_blocked"
    status = 422


# --- jobs ---------------------------------------------------------------------------------------------------------


class JobError(BaseAppException):
    """The job does not allow this operation."""

    code = "job_error"
    status = 409


class JobStateError(JobError):
    """The job's state does not allow this."""

    code = "job_state_conflict"


class JobTimeoutError(JobError):
    """The job ran longer than its `timeout_s`."""

    code = "job_timeout"
    status = 500


class JobCrashedError(JobError):
    """The worker process crashed repeatedly during the job's model work."""

    code = "job_crashed"
    status = 500


class OriginalDeletedError(JobError):
    """The original output was deleted before the job could draw it again."""

    code = "original_deleted"


class OriginalUnreadableError(JobError):
    """The output cannot be drawn again, because another release recorded it in a form that this release cannot read."""

    code = "original_unreadable"


class JobUnreadableError(JobError):
    """This release cannot read the job, because another release accepted it."""

    code = "job_unreadable"
    status = 503
    retry_after_s = 5


class QueueFullError(JobError):
    """The service has more queued work than it accepts."""

    code = "queue_full"
    status = 503
    retry_after_s = 30


class OwnerQueueFullError(JobError):
    """This owner has reached its limit of queued jobs."""

    code = "owner_queue_full"
    status = 429
    retry_after_s = 30


class BulkError(BaseAppException):
    """The bulk does not allow this operation."""

    code = "bulk_error"
    status = 409


class BulkStateError(BulkError):
    """The bulk's state does not allow this."""

    code = "bulk_state_conflict"


class BulkOffsetError(BulkError):
    """The bulk has received a different number of lines, or different lines."""

    code = "bulk_offset_mismatch"


class BulkTooLargeError(BulkError):
    """The bulk has more items than this service accepts in one bulk."""

    code = "bulk_too_large"
    status = 413


class BulkQuotaError(BulkError):
    """This owner has reached its limit of unfinished bulks or of items in them."""

    code = "bulk_quota_exceeded"
    status = 429
    retry_after_s = 60


# --- requests -----------------------------------------------------------------------------------------------------


class ValidationError(BaseAppException):
    """The request is not valid."""

    code = "validation_failed"
    status = 422

    def __init__(
        self, message: str | None = None, *, errors: list[Mapping[str, Any]] | None = None, **context: Any
    ) -> None:
        super().__init__(message, **context)
        self.errors = errors or []


class MalformedBodyError(ValidationError):
    """The body is not valid JSON."""

    code = "malformed_body"
    status = 400


class BulkInvalidError(ValidationError):
    """The bulk has invalid lines, so it does not run."""

    code = "bulk_invalid"


class IdempotencyKeyReusedError(ValidationError):
    """This Idempotency-Key was already sent with another request."""

    code = "idempotency_key_reused"


class InvalidCursorError(ValidationError):
    """The page cursor was not issued by this service."""

    code = "invalid_cursor"
    status = 400


class ForbiddenTargetError(ValidationError):
    """This service does not send requests to that URL."""

    code = "forbidden_target"


class InvalidImageError(ValidationError):
    """The file is not an image that this service accepts."""

    code = "invalid_image"


class ImageTooLargeError(InvalidImageError):
    """The image has more bytes or pixels than this service accepts."""

    code = "image_too_large"
    status = 413


class AnimatedImageError(InvalidImageError):
    """Animated images are not accepted."""

    code = "animated_image"


class UnsupportedImageTypeError(InvalidImageError):
    """Only PNG, JPEG, WebP and AVIF images are accepted."""

    code = "unsupported_image_type"
    status = 415


class ResourceNotFoundError(BaseAppException):
    """No resource has this id."""

    code = "not_found"
    status = 404


class CollectionUnavailableError(ResourceNotFoundError):
    """The collection does not exist, or is not shared with this owner any more."""

    code = "collection_unavailable"


class CollectionAccessError(BaseAppException):
    """The collection is shared with you, but not for this."""

    code = "collection_access"
    status = 403


class CollectionExistsError(BaseAppException):
    """A collection of this name exists."""

    code = "collection_exists"
    status = 409


class CollectionLimitError(BaseAppException):
    """The owner has as many collections as the service allows."""

    code = "collection_limit"
    status = 409


class SharedCollectionError(BaseAppException):
    """The collection `shared` belongs to all owners. It cannot be changed, shared or deleted."""

    code = "shared_collection"
    status = 409


class OutputWithdrawnError(BaseAppException):
    """This output was withdrawn, because an image from which it drew was withdrawn."""

    code = "output_withdrawn"
    status = 410


class RateLimitError(BaseAppException):
    """Too many requests."""

    code = "rate_limited"
    status = 429
    retry_after_s = 1


class QuotaExceededError(RateLimitError):
    """This owner has reached its quota of images for today."""

    code = "quota_exceeded"


class TooManyStreamsError(BaseAppException):
    """This process has reached its limit of streams, waiting requests or transfers, in total or for this owner."""

    code = "too_many_streams"
    status = 503
    retry_after_s = 5


class AuthenticationError(BaseAppException):
    """A valid API key is needed."""

    code = "authentication_required"
    status = 401


class AuthorizationError(BaseAppException):
    """This API key does not allow this operation."""

    code = "forbidden"
    status = 403


# --- other services -----------------------------------------------------------------------------------------------


class ExternalServiceError(BaseAppException):
    """A service that this one depends on failed."""

    code = "external_service_failed"
    status = 503
    retry_after_s = 5


class StorageError(ExternalServiceError):
    """The blob store failed."""

    code = "storage_unavailable"


class ForeignStorageError(StorageError):
    """The blob store is swept for another database."""

    code = "foreign_storage"


class UploadInterruptedError(StorageError):
    """Storing the upload took too long; send it again."""

    code = "upload_interrupted"


class EngineUnavailableError(ExternalServiceError):
    """No engine of this model could draw the image."""

    code = "engine_unavailable"


class BrokerUnavailableError(ExternalServiceError):
    """The message broker cannot be reached."""

    code = "broker_unavailable"


class DecoderBusyError(ExternalServiceError):
    """Too many uploads are being decoded at once."""

    code = "decoder_busy"
    retry_after_s = 2
