"""Range requests (RFC 9110, 14): one range of a file's bytes."""

import re

from flask import Request
from werkzeug.exceptions import RequestedRangeNotSatisfiable

BYTE_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)


def requested_range(request: Request, *, etag: str, size_bytes: int) -> range | None:
    """Return the positions of the bytes that the request asks for; `None`: all bytes.

    Several ranges, other units and invalid ranges are ignored, as RFC 9110 permits. So is a range of another version.

    Raises:
        RequestedRangeNotSatisfiable: the file has none of these bytes.
    """
    match = BYTE_RANGE.fullmatch(request.headers.get("Range", ""))
    # Only a strong tag proves that the client has bytes of this version. Files have no date that could.
    if match is None or request.method != "GET" or request.headers.get("If-Range", f'"{etag}"') != f'"{etag}"':
        return None
    first, last = match.groups()
    if first:
        wanted = range(int(first), min(int(last), size_bytes - 1) + 1 if last else size_bytes)
        if last and int(last) < int(first):
            return None
    elif last:
        wanted = range(max(0, size_bytes - int(last)), size_bytes)
    else:
        return None
    if not wanted:
        raise RequestedRangeNotSatisfiable(length=size_bytes)
    return wanted
