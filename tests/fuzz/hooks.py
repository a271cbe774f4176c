"""What Schemathesis cannot know by itself: how a body of JSON Lines is written, and what it must not end."""

import json
import os
from typing import Any
from uuid import uuid4

import schemathesis

SPARED = "FUZZ_SPARED"
"""Names the variable with the ids, separated by commas, of the key and the owner that it works with."""
CHANGING = ("PATCH", "POST", "DELETE")


@schemathesis.serializer("application/jsonl", "application/x-ndjson", "application/x-jsonlines")
def json_lines(_context: Any, value: Any) -> bytes:
    """A list is one line each; text goes as it is, valid or not; anything else is one line."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    lines = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: dict[str, Any]) -> None:
    """It takes ids from the lists it has read, and after it has revoked its own key every answer is a 401."""
    if case.method.upper() in CHANGING:
        spared = os.environ.get(SPARED, "").split(",")
        for name, value in (case.path_parameters or {}).items():
            if value in spared:
                case.path_parameters[name] = str(uuid4())
