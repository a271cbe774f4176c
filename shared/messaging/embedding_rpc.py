"""Requests the vector of a query from the embed workers: both sides of one small protocol on Redis.

A request is a Celery message with a few texts or with the key of an image. The worker pushes the reply to a Redis list
that only the client knows. Both expire after half a minute at the latest.
"""

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import numpy as np
import orjson
import redis
from numpy.typing import NDArray
from PIL import Image

from shared.db import spaces, workers
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import BaseAppException, BrokerUnavailableError, EmbeddingError, EmbeddingUnavailableError
from shared.imaging import open_image
from shared.messaging import foreign, queue
from shared.messaging.redis import connect
from shared.settings import get_settings
from shared.singleton import process_singleton

MESSAGE_TTL_S = 30
"""How long a query image and a reply stay in Redis at most."""
WORKERS_SEEN_S = 2.0
REPLY_PREFIX = "afterimage:reply:"
IMAGE_PREFIX = "afterimage:query-image:"

Vectors = NDArray[np.float32]


# --- the client ---------------------------------------------------------------------------------------------------


def embed_texts(texts: list[str], space: Space) -> Vectors:
    """The vectors of `texts` in this embedding space, in the same order: shape (n, space.dim), float32, not normalised.

    Raises:
        EmbeddingUnavailableError: no worker of the space answered within `retrieval.text_timeout_s`, or the broker is
            away.
        DatabaseConnectionError: the database is away.
        EmbeddingError: the worker failed to embed them.
    """
    return _request({"texts": texts}, space, count=len(texts))


def embed_image(png: bytes, space: Space) -> Vectors:
    """The vector of one image in this embedding space: shape (space.dim,), float32, not normalised.

    png: an image file, longest side at most 512 pixels.

    Raises:
        EmbeddingUnavailableError, EmbeddingError: as in `embed_texts`.
    """
    key = f"{IMAGE_PREFIX}{uuid4()}"
    try:
        _waiting_connection().set(key, png, ex=MESSAGE_TTL_S)
        try:
            vector: Vectors = _request({"image_key": key}, space, count=1)[0]
            return vector
        finally:
            _waiting_connection().unlink(key)
    except redis.RedisError as error:
        raise EmbeddingUnavailableError from error


def _request(payload: dict[str, Any], space: Space, *, count: int) -> Vectors:
    """Send the request, and wait for `count` vectors from a worker of this space.

    A worker that is killed takes its message along. So a message that is in no queue any more, and has no answer after
    half of the time, is sent once more.
    """
    name = _queue_of(space)
    reply_key = f"{REPLY_PREFIX}{uuid4()}"
    timeout_s = get_settings().retrieval.text_timeout_s
    try:
        queue.publish_embed_query(name, reply_key, payload, expires_s=timeout_s)
        reply = _waiting_connection().blpop([reply_key], timeout=timeout_s / 2)
        if reply is None:
            if not _waiting_connection().exists(*queue.broker_lists(name)):
                queue.publish_embed_query(name, reply_key, payload, expires_s=timeout_s / 2)
            reply = _waiting_connection().blpop([reply_key], timeout=timeout_s / 2)
    except (BrokerUnavailableError, redis.RedisError) as error:
        raise EmbeddingUnavailableError from error
    if reply is None:
        raise EmbeddingUnavailableError
    digest, vectors = _decoded(reply[1])
    if digest != space.digest or vectors.shape != (count, space.dim):
        raise EmbeddingUnavailableError("The embed worker that answered makes vectors of another embedding space.")
    return vectors


def _queue_of(space: Space) -> str:
    """The queue of the space, or the one of the active space while only workers of the previous release run.

    Workers that were seen are taken to run for `WORKERS_SEEN_S`.

    Raises:
        EmbeddingUnavailableError: the space is not the active one, and no worker of it runs.
    """
    seen = _seen()
    if time.monotonic() < seen.get(space.digest, 0):
        return queue.embed_queries_queue(space)
    with session_scope() as session:
        if any(worker.state != "loading" for worker in workers.list_of_space(session, space.digest, kind="embed")):
            seen[space.digest] = time.monotonic() + WORKERS_SEEN_S
            return queue.embed_queries_queue(space)
        if spaces.is_active(session, space):
            return queue.EMBED_QUERIES_QUEUE
    raise EmbeddingUnavailableError("No embed worker of this embedding space runs.", embedding_space=space.digest)


@process_singleton
def _seen() -> dict[str, float]:
    """For the digest of a space, the monotonic time until which its workers are not looked for again."""
    return {}


@process_singleton
def _waiting_connection() -> redis.Redis:
    """A connection whose read timeout is longer than the time that a worker may take."""
    settings = get_settings()
    return connect(
        settings.queue.url.get_secret_value(),
        timeout_s=settings.queue.socket_timeout_s,
        reply_timeout_s=settings.retrieval.text_timeout_s + 1,
    )


def _decoded(data: bytes | str) -> tuple[str, Vectors]:
    """The digest of the embedding space, and the vectors."""
    try:
        reply = orjson.loads(data)
        if "error" in reply:
            error = EmbeddingError(str(reply["error"]["detail"]), cause=str(reply["error"]["code"]))
        else:
            vectors = [np.frombuffer(base64.b64decode(vector), dtype="<f4") for vector in reply["vectors"]]
            return str(reply["space"]), np.stack(vectors).astype(np.float32)
    except (ValueError, TypeError, LookupError) as unreadable:
        foreign.record_dropped("reply", unreadable)
        raise EmbeddingUnavailableError from unreadable
    raise error


# --- the embed worker ---------------------------------------------------------------------------------------------


def answer(
    reply_key: str,
    payload: dict[str, Any],
    *,
    space_digest: str,
    embed: Callable[[Sequence[str] | Sequence[Image.Image]], Vectors],
) -> None:
    """Embed the texts or the image of a request, and push the vectors, or the error, to the list `reply_key`.

    embed: returns vectors of shape (n, dim), float32, not normalised, for texts or for RGB images.

    Raises:
        BrokerUnavailableError: Redis did not take the reply.
    """
    if not _is_request(reply_key, payload):
        foreign.record_dropped("queue", "no query")
        return
    try:
        vectors = embed(_payload_items(payload))
        encoded = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        body: dict[str, Any] = {"space": space_digest, "vectors": encoded}
    except BaseAppException as error:
        # The client gets the error at once instead of waiting for its timeout.
        body = {"error": error.body()}
    try:
        with queue.broker().pipeline(transaction=True) as pipeline:
            pipeline.rpush(reply_key, orjson.dumps(body))
            pipeline.expire(reply_key, MESSAGE_TTL_S)
            pipeline.execute()
    except redis.RedisError as error:
        raise BrokerUnavailableError from error


def _is_request(reply_key: Any, payload: Any) -> bool:
    """Whether `_request` made this. Another message could name any key of Redis."""
    if not (str(reply_key).startswith(REPLY_PREFIX) and isinstance(payload, dict)):
        return False
    if "texts" in payload:
        texts = payload["texts"]
        return isinstance(texts, list) and bool(texts) and all(isinstance(text, str) for text in texts)
    return str(payload.get("image_key")).startswith(IMAGE_PREFIX)


def _payload_items(payload: dict[str, Any]) -> Sequence[str] | Sequence[Image.Image]:
    if "texts" in payload:
        texts: list[str] = payload["texts"]
        return texts
    try:
        data = queue.broker().get(payload["image_key"])
    except redis.RedisError as error:
        raise BrokerUnavailableError from error
    if not isinstance(data, bytes):
        raise EmbeddingError("The image of the query is gone.")
    return [open_image(data)]
