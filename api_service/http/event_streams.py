"""Server-sent events: the response that streams them, and the bytes of one message."""

from collections.abc import Iterator
from functools import partial
from uuid import UUID

import orjson
from flask import Response

from api_service.http.concurrency import waiter_slots
from shared.errors import TooManyStreamsError

HEARTBEAT = b": still here\n\n"
HEARTBEAT_S = 15.0


def stream_response(messages: Iterator[bytes], *, owner_id: UUID) -> Response:
    """Return a response that streams `messages`, and holds one waiter slot of the owner until it is closed.

    Raises:
        TooManyStreamsError: this process has reached its limit of waiters, in total or for this owner.
    """
    slots = waiter_slots()
    if not slots.take(owner_id):
        raise TooManyStreamsError
    response = Response(messages, content_type="text/event-stream")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"
    # Not in the generator: if it is closed before its first step, its `finally` does not run.
    response.call_on_close(partial(slots.release, owner_id))
    return response


def sse_message(name: str, data: object, *, event_id: int | None = None) -> bytes:
    id_line = b"" if event_id is None else b"id: %d\n" % event_id
    return b"%sevent: %s\ndata: %s\n\n" % (id_line, name.encode(), orjson.dumps(data))
