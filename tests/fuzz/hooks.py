"""Hooks of Schemathesis: how to write a body of JSON Lines, and which key and owner to leave alone."""

import json
import os
from typing import Any
from uuid import uuid4

import schemathesis

SPARED = "FUZZ_SPARED"
"""The environment variable with the ids, separated by commas, of the key and the owner of the run."""
CHANGING = ("PATCH", "POST", "DELETE")


@schemathesis.serializer("application/jsonl", "application/x-ndjson", "application/x-jsonlines")
def json_lines(_context: Any, value: Any) -> bytes:
    """Write each element of a list as a line, text unchanged (valid or not), and other values as one line."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    lines = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: dict[str, Any]) -> None:
    """Replace the ids of the run's own key and owner in changing requests.

    Schemathesis takes ids from the lists that it has read. After it has revoked its own key, every answer is a 401.
    """
    if case.method.upper() in CHANGING:
        spared = os.environ.get(SPARED, "").split(",")
        for name, value in (case.path_parameters or {}).items():
            if value in spared:
                case.path_parameters[name] = str(uuid4())
