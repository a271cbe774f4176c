"""Checks of messages and keys that another program may have written to Redis.

An unreadable one is dropped, counted and logged, and ends no process. Log lines name the place and the kind of error,
and never the content, because it may be secret.
"""

import base64
import logging
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import orjson
import redis
from pydantic import BaseModel, Field, Json, StringConstraints, TypeAdapter, ValidationError

from shared.metrics import MESSAGES_DROPPED, increment_counter

logger = logging.getLogger(__name__)

Message = TypeVar("Message", "_TaskMessage", "_CommandMessage")
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class UnreadableMessageError(ValueError):
    """This is not a message of this service."""


class _Headers(BaseModel):
    """The headers of Celery's message protocol 2 that a worker reads.

    https://docs.celeryq.dev/en/stable/internals/protocol.html
    """

    task: Name
    id: Name
    eta: None = None
    expires: datetime | None = None
    timelimit: tuple[None, None] = (None, None)
    retries: int = 0
    stamps: dict[str, Any] | None = None
    stamped_headers: list[str] | None = None


class _Properties(BaseModel):
    delivery_tag: Name
    delivery_info: dict[str, Any]
    priority: int = 0
    body_encoding: Literal["base64"]


class _TaskMessage(BaseModel):
    content_type: Literal["application/json"] = Field(alias="content-type")
    content_encoding: Literal["utf-8"] = Field(alias="content-encoding")
    headers: _Headers
    properties: _Properties
    body: str


class _CommandHeaders(BaseModel):
    clock: int | None = None
    expires: float | None = None


class _CommandMessage(BaseModel):
    """A message of Celery's remote control, such as `revoke`."""

    content_type: Literal["application/json"] = Field(alias="content-type")
    content_encoding: Literal["utf-8"] = Field(alias="content-encoding")
    headers: _CommandHeaders
    properties: _Properties
    body: str


class _Command(BaseModel):
    method: Name
    arguments: dict[str, Any] | None = None
    destination: list[str] | None = None
    reply_to: dict[str, str] | None = None


_MESSAGE = TypeAdapter(_TaskMessage)
_COMMAND_MESSAGE = TypeAdapter(_CommandMessage)
_COMMAND: TypeAdapter[Any] = TypeAdapter(Json[_Command])
_BODY: TypeAdapter[Any] = TypeAdapter(Json[tuple[list[Any], dict[str, Any], dict[str, Any]]])


def read_task_id(message: bytes) -> str:
    """The task's id in a message from one of the broker's lists.

    Raises:
        UnreadableMessageError: this is not a message of this service.
    """
    try:
        return check_task_message(orjson.loads(message))
    except orjson.JSONDecodeError as error:
        raise UnreadableMessageError("no JSON") from error


def check_task_message(message: Any) -> str:
    """Check that Celery can read a message, and return the task's id. message: decoded from JSON.

    Raises:
        UnreadableMessageError: this is not a message of this service.
    """
    return _check(message, _MESSAGE, _BODY).headers.id


def check_command(message: Any) -> None:
    """Check that Celery can read a message of its remote control. message: decoded from JSON.

    Raises:
        UnreadableMessageError: this is not such a message.
    """
    _check(message, _COMMAND_MESSAGE, _COMMAND)


def _check(message: Any, outer: TypeAdapter[Message], body: TypeAdapter[Any]) -> Message:
    try:
        checked = outer.validate_python(message)
        body.validate_python(base64.b64decode(checked.body, validate=True))
        return checked
    except ValidationError as error:
        wrong = ".".join(str(part) for part in error.errors(include_input=False)[0]["loc"])
        raise UnreadableMessageError(f"wrong: {wrong or 'message'}"[:100]) from None
    except ValueError:
        raise UnreadableMessageError("wrong: body") from None


def record_dropped(source: str, cause: Exception | str) -> None:
    """Count and log that something unreadable was dropped. source: where it was, without ids."""
    increment_counter(MESSAGES_DROPPED, labels={"source": source})
    known = isinstance(cause, str | UnreadableMessageError)
    logger.warning("message_dropped", extra={"source": source, "cause": str(cause) if known else type(cause).__name__})


def drop_foreign_keys(client: redis.Redis, lists: Iterable[str]) -> None:
    """Delete each of these keys of the broker that another program has set to another type than a list.

    A command on such a key fails, so nothing could be published or read.

    Raises:
        redis.RedisError: the broker failed.
    """
    expected = dict.fromkeys(lists, b"list") | {
        "unacked": b"hash",
        "unacked_index": b"zset",
        "unacked_mutex": b"string",
    }
    with client.pipeline(transaction=False) as pipeline:
        for name in expected:
            pipeline.type(name)
        types = dict(zip(expected, pipeline.execute(), strict=True))
    for name, found in types.items():
        if found not in (expected[name], b"none"):
            client.delete(name)
            record_dropped(name, f"a key of type {found.decode()}")
