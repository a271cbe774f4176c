"""A worker of the previous release, until a file marks this process as replaced.

Run it as `python -m tests.release_worker`, with the arguments of `worker_service`. The variable `PREVIOUS_RELEASE` is
the folder of the old code, `REPLACED` a folder of marker files. If that folder has a file
with the name of this process in supervisor, the process runs the current code instead.
"""

import os
import sys
from pathlib import Path

PREVIOUS, REPLACED = "PREVIOUS_RELEASE", "REPLACED"
NEW_SETTINGS = {"AFTERIMAGE_SECURITY__SIGNING_KEYS"}
"""Settings of a local stack that the previous release does not know, and so refuses."""


def main() -> None:
    name = os.environ["SUPERVISOR_PROCESS_NAME"]
    if not (Path(os.environ[REPLACED]) / name).exists():
        os.chdir(os.environ[PREVIOUS])
        for setting in NEW_SETTINGS:
            os.environ.pop(setting, None)
    # `-m` finds modules in the current folder first.
    os.execv(sys.executable, [sys.executable, "-u", "-m", "worker_service", *sys.argv[1:]])


if __name__ == "__main__":
    main()
