"""Health check of a container: `python -m ops.probe URL`. It exits with status 1 unless the answer's status is 2xx.

Docker marks an unhealthy container, and does not restart it. So a process that gives no answer at all for `GIVE_UP_S`
is killed here, and the container's restart policy starts it again. A process that answers 503 lives: it loads a model,
or waits for a server.
"""

import os
import signal
import sys
import tempfile
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

TIMEOUT_S = 5.0
GIVE_UP_S = 120.0
"""Longer than a container needs until it listens, and than a loaded machine may pause it."""
SILENT_SINCE = Path(tempfile.gettempdir()) / "silent-since"
"""Its time of change is the first failed check of a row. A new container has no such file."""


def main(url: str, *, silent_since: Path = SILENT_SINCE, give_up_s: float = GIVE_UP_S) -> int:
    try:
        with urlopen(url, timeout=TIMEOUT_S) as answer:  # a fixed address of this container  # nosec B310
            status = answer.status
    except HTTPError as refused:
        status = refused.code
    except (OSError, HTTPException):
        status = None
    if status is not None:
        silent_since.unlink(missing_ok=True)
        return 0 if 200 <= status < 300 else 1
    if not silent_since.exists():
        silent_since.touch()
    elif time.time() - silent_since.stat().st_mtime > give_up_s:
        silent_since.unlink()
        kill_container()
    return 1


def kill_container() -> None:
    """Kill every process of this container but the first one, which then ends by itself. Frozen ones end too."""
    print(f"no answer for {GIVE_UP_S:g} s: the container is restarted", file=sys.stderr)
    os.kill(-1, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
