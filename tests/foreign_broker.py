"""Messages of other programs in a broker, and a broker that refuses writes."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args
from uuid import uuid4

import orjson
import redis

from shared.messaging import queue

SECRET = "do-not-log-this"
"""Part of the foreign messages. It must not be in any log."""

Refusal = Literal["READONLY", "NOREPLICAS", "OOM"]
REFUSALS: tuple[Refusal, ...] = get_args(Refusal)
"""The error codes of a replica, of a primary that lost its replicas, and of a full server."""


def message(**changes: Any) -> dict[str, Any]:
    """A message as this service publishes it, with changes in its headers, properties or other parts."""
    job_id = str(uuid4())
    parts: dict[str, Any] = {
        "body": body([job_id], {}, {}),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": queue.GENERATE, "id": job_id},
        "properties": {
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue.broker_lists(queue.generate_queue("cheap"))[0]},
            "priority": 0,
            "body_encoding": "base64",
        },
    }
    for name, value in changes.items():
        part = name.replace("_", "-") if name.startswith("content") else name
        parts[part] = parts[part] | value if isinstance(value, dict) else value
    return parts


def body(*parts: Any) -> str:
    return base64.b64encode(orjson.dumps(parts)).decode()


FOREIGN = [
    *(SECRET.encode(), b"\xff\xfe", b"", b"[" * 100_000, b"null", b"[]", b"1", b'"text"', b"{}", b'{"properties": {}}'),
    *(
        orjson.dumps(each)
        for each in (
            message(headers={"task": None}),
            message(headers={"task": SECRET}),
            message(headers={"id": 5}),
            message(headers={"expires": SECRET}),
            message(headers={"eta": "2020-01-01T00:00:00"}),
            message(headers={"timelimit": SECRET}),
            message(headers={"stamped_headers": 5}),
            message(headers={"task": queue.EMBED_QUERY}),
            message(properties={"delivery_tag": {"a": 1}}),
            message(properties={"delivery_info": None}),
            message(properties={"priority": SECRET}),
            message(properties={"body_encoding": "rot13"}),
            message(content_type="application/x-python-serialize"),
            message(content_encoding="utf-16"),
            message(body=SECRET),
            message(body=body({"task": queue.GENERATE, "args": [SECRET], "id": "1"})),
            message(body=body([SECRET], {}, {})),
            message(body=body([5], {}, {})),
            message(body=body([], {}, {})),
            message(body=body(["a", "b"], {}, {})),
            message(body=body([], {"other": SECRET}, {})),
            # Celery's protocol 1
            message(headers={}, body=body()) | {"headers": {}, "body": base64.b64encode(b'{"task": "x"}').decode()},
        )
    ),
]


@contextmanager
def refusing_writes(redis_url: str, how: Refusal) -> Iterator[None]:
    """Let a server refuse writes until the block ends. It keeps its data."""
    with redis.Redis.from_url(redis_url) as admin:
        if how == "READONLY":
            admin.replicaof("127.0.0.1", 1)
        elif how == "NOREPLICAS":
            admin.config_set("min-replicas-to-write", 1)
        else:
            admin.config_set("maxmemory", 1)
        try:
            yield
        finally:
            admin.config_set("min-replicas-to-write", 0)
            admin.config_set("maxmemory", 0)
            admin.replicaof("NO", "ONE")
