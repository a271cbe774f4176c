"""How Schemathesis writes a body of JSON Lines, which it does not know by itself."""

import json
from typing import Any

import schemathesis


@schemathesis.serializer("application/jsonl", "application/x-ndjson", "application/x-jsonlines")
def json_lines(_context: Any, value: Any) -> bytes:
    """A list is one line each; text goes as it is, valid or not; anything else is one line."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    lines = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
