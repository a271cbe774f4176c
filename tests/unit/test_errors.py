"""The tree of errors, which clients match by code."""

import pickle
from http import HTTPStatus

import orjson
import pytest

from shared import errors
from shared.errors import BaseAppException


def tree(kind: type[BaseAppException]) -> list[type[BaseAppException]]:
    return [kind, *(found for child in kind.__subclasses__() for found in tree(child))]


# Only the errors of `shared.errors`, without those that tests and other modules define.
ALL = [kind for kind in dict.fromkeys(tree(BaseAppException)) if kind.__module__ == "shared.errors"]

FIRST_VERSION = {
    "ConfigurationError": "BaseAppException",
    "DatabaseError": "BaseAppException",
    "DatabaseConnectionError": "DatabaseError",
    "DatabaseQueryError": "DatabaseError",
    "ModelError": "BaseAppException",
    "ModelNotFoundError": "ModelError",
    "ModelLoadError": "ModelError",
    "EmbeddingError": "BaseAppException",
    "ImageGenerationError": "BaseAppException",
    "ValidationError": "BaseAppException",
    "ResourceNotFoundError": "BaseAppException",
    "RateLimitError": "BaseAppException",
    "AuthenticationError": "BaseAppException",
    "AuthorizationError": "BaseAppException",
    "ExternalServiceError": "BaseAppException",
}

# Clients match these codes. A line may be added. A line that is changed or removed breaks clients.
PUBLISHED = {
    "internal_error": 500,
    "configuration_error": 500,
    "database_error": 500,
    "database_unavailable": 503,
    "database_conflict": 503,
    "database_query_failed": 500,
    "model_error": 500,
    "model_not_found": 422,
    "model_load_failed": 500,
    "out_of_memory": 500,
    "embedding_failed": 500,
    "embedding_crashed": 500,
    "embedding_unavailable": 503,
    "generation_failed": 500,
    "mode_not_supported": 422,
    "no_reference": 422,
    "size_not_supported": 422,
    "parameter_not_supported": 422,
    "reference_unavailable": 422,
    "reference_deleted": 422,
    "plan_invalid": 422,
    "plan_expired": 422,
    "plan_outdated": 422,
    "plan_mismatch": 422,
    "content_credentials_failed": 500,
    "invalid_output": 500,
    "engine_refused": 422,
    "content_refused": 422,
    "prompt_blocked": 422,
    "output_blocked": 422,
    "job_error": 409,
    "job_state_conflict": 409,
    "job_timeout": 500,
    "job_crashed": 500,
    "job_unreadable": 503,
    "queue_full": 503,
    "owner_queue_full": 429,
    "validation_failed": 422,
    "malformed_body": 400,
    "invalid_cursor": 400,
    "invalid_image": 422,
    "image_too_large": 413,
    "animated_image": 422,
    "unsupported_image_type": 415,
    "not_found": 404,
    "rate_limited": 429,
    "quota_exceeded": 429,
    "authentication_required": 401,
    "forbidden": 403,
    "external_service_failed": 503,
    "storage_unavailable": 503,
    "foreign_storage": 503,
    "upload_interrupted": 503,
    "engine_unavailable": 503,
    "broker_unavailable": 503,
    "collection_access": 403,
    "collection_exists": 409,
    "collection_limit": 409,
    "collection_unavailable": 404,
    "shared_collection": 409,
    "decoder_busy": 503,
    "too_many_streams": 503,
}


def test_the_errors_of_the_first_version_keep_their_names_and_parents() -> None:
    for name, parent in FIRST_VERSION.items():
        assert getattr(errors, name).__bases__ == (getattr(errors, parent),)


def test_there_are_more_than_fifteen_errors_each_with_a_code_of_its_own() -> None:
    codes = [kind.code for kind in ALL]
    assert len(ALL) > 15
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("code", PUBLISHED)
def test_a_published_code_keeps_its_status(code: str) -> None:
    assert {kind.code: kind.status for kind in ALL}.get(code) == PUBLISHED[code]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
class TestEachKind:
    def test_has_a_message_of_its_own(self, kind: type[BaseAppException]) -> None:
        assert kind.__doc__
        assert kind.__dict__.get("__doc__") == kind.__doc__
        assert kind().message.endswith(".")
        assert str(kind("Another.")) == kind("Another.").message == "Another."

    def test_has_a_code_and_a_status_that_exist(self, kind: type[BaseAppException]) -> None:
        assert kind.__dict__.get("code") == kind.code
        assert kind.code.replace("_", "").isalpha()
        assert kind.code.islower()
        assert HTTPStatus(kind.status) >= 400

    def test_has_a_retry_after_exactly_for_status_429_and_503(self, kind: type[BaseAppException]) -> None:
        assert (kind.retry_after_s is not None) == (kind.status in (429, 503))

    def test_can_be_encoded_as_json(self, kind: type[BaseAppException]) -> None:
        body = orjson.loads(orjson.dumps(kind("Sentence.", width=512).body()))
        assert body == {"code": kind.code, "detail": "Sentence.", "context": {"width": 512}}
        assert "context" not in kind().body()

    def test_is_unchanged_after_pickling(self, kind: type[BaseAppException]) -> None:
        error = kind("Sentence.", width=512)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.body()) == (kind, error.body())


def test_a_validation_error_keeps_its_list_after_pickling() -> None:
    error = errors.ValidationError(errors=[{"field": "body.width", "code": "too_big", "message": "..."}])
    assert pickle.loads(pickle.dumps(error)).errors == error.errors
