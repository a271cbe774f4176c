"""A worker of the release before, until a file says that this one's turn to be replaced has come.

`python -m tests.release_worker`, with the arguments of `worker_service`. `PREVIOUS_RELEASE` is the folder of the old
code, `REPLACED` the folder in which a file with this process's name (as supervisor calls it) makes it a new one.
"""

import os
import sys
from pathlib import Path

PREVIOUS, REPLACED = "PREVIOUS_RELEASE", "REPLACED"


def main() -> None:
    name = os.environ["SUPERVISOR_PROCESS_NAME"]
    if not (Path(os.environ[REPLACED]) / name).exists():
        os.chdir(os.environ[PREVIOUS])
    # `-m` finds modules in the current folder first.
    os.execv(sys.executable, [sys.executable, "-u", "-m", "worker_service", *sys.argv[1:]])


if __name__ == "__main__":
    main()
