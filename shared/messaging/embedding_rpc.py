"""Asking the embed workers for the vector of a query, and answering: both sides of one small protocol on Redis.

The question is a Celery message with a few texts or with the key of an image; the answer is pushed to a list that
only the asker knows. Nothing of it lives longer than half a minute.
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import orjson
import redis
from numpy.typing import NDArray
from PIL import Image
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.errors import BaseAppException, BrokerUnavailableError, EmbeddingError, EmbeddingUnavailableError
from shared.imaging import open_image
from shared.messaging import queue
from shared.settings import get_settings
from shared.singleton import once

LIFE_S = 30
"""How long an image and an answer lie in Redis at most."""
REPLY_PREFIX = "afterimage:reply:"
IMAGE_PREFIX = "afterimage:query-image:"

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """`vectors`: shape (n, dim), float32, not normalised. `space`: digest of the embedding space they lie in."""

    space: str
    vectors: Vectors


# --- asking -------------------------------------------------------------------------------------------------------


def embed_texts(texts: list[str]) -> Answer:
    """The vectors of some texts, in order.

    Raises:
        EmbeddingUnavailableError: no worker answered within `retrieval.text_timeout_s`, or the broker is away.
        EmbeddingError: the worker could not.
    """
    return _ask({"texts": texts})


def embed_image(png: bytes) -> Answer:
    """The vector of one image. png: an image file, longest side at most 512 pixels.

    Raises:
        EmbeddingUnavailableError, EmbeddingError: as `embed_texts`.
    """
    key = f"{IMAGE_PREFIX}{uuid4()}"
    try:
        _waiting_connection().set(key, png, ex=LIFE_S)
    except redis.RedisError as error:
        raise EmbeddingUnavailableError from error
    return _ask({"image_key": key})


def _ask(payload: dict[str, Any]) -> Answer:
    reply_key = f"{REPLY_PREFIX}{uuid4()}"
    timeout_s = get_settings().retrieval.text_timeout_s
    try:
        queue.publish_embed_query(reply_key, payload, expires_s=timeout_s)
        reply = _waiting_connection().blpop([reply_key], timeout=timeout_s)
    except (BrokerUnavailableError, redis.RedisError) as error:
        raise EmbeddingUnavailableError from error
    if reply is None:
        raise EmbeddingUnavailableError
    return _decoded(orjson.loads(reply[1]))


@once
def _waiting_connection() -> redis.Redis:
    """A connection that may be silent for as long as a worker may take."""
    settings = get_settings()
    return redis.Redis.from_url(
        settings.queue.url.get_secret_value(),
        socket_timeout=settings.retrieval.text_timeout_s + 1,
        socket_connect_timeout=settings.queue.socket_timeout_s,
        retry=Retry(NoBackoff(), 0),
    )


def _decoded(reply: dict[str, Any]) -> Answer:
    if "error" in reply:
        raise EmbeddingError(reply["error"]["detail"], cause=reply["error"]["code"])
    vectors = [np.frombuffer(base64.b64decode(vector), dtype="<f4") for vector in reply["vectors"]]
    return Answer(space=reply["space"], vectors=np.stack(vectors).astype(np.float32))


# --- answering ----------------------------------------------------------------------------------------------------


def answer(
    reply_key: str,
    payload: dict[str, Any],
    *,
    space_digest: str,
    embed: Callable[[Sequence[str] | Sequence[Image.Image]], Vectors],
) -> None:
    """Embed what a question holds and push the answer, or the error, to whoever waits for it.

    embed: gives vectors of shape (n, dim), float32, not normalised, for texts or for RGB images.
    """
    try:
        vectors = embed(_question(payload))
        encoded = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        body: dict[str, Any] = {"space": space_digest, "vectors": encoded}
    except BaseAppException as error:
        # Told, so that the asker does not wait in vain.
        body = {"error": error.body()}
    try:
        with queue.broker().pipeline(transaction=True) as pipeline:
            pipeline.rpush(reply_key, orjson.dumps(body))
            pipeline.expire(reply_key, LIFE_S)
            pipeline.execute()
    except redis.RedisError as error:
        raise BrokerUnavailableError from error


def _question(payload: dict[str, Any]) -> Sequence[str] | Sequence[Image.Image]:
    if "texts" in payload:
        texts: list[str] = payload["texts"]
        return texts
    try:
        data = queue.broker().getdel(payload["image_key"])
    except redis.RedisError as error:
        raise BrokerUnavailableError from error
    if not isinstance(data, bytes):
        raise EmbeddingError("The image of the query is gone.")
    return [open_image(data)]
