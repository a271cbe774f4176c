"""`python -m ops.local.alone COMMAND...`: become COMMAND, after ending what a killed predecessor left behind.

Granian serves from a child process. When only the parent is killed, the child lives on and shares the port with its
successor, with old code and old settings. In a container the whole process tree ends; here supervisor restarts just
the parent, so each start clears up first.
"""

import os
import sys
from pathlib import Path

import psutil

from ops.local.orphans import MARK, processes_of

NAME = "SUPERVISOR_PROCESS_NAME"
"""Set by supervisor for each program, and inherited by the program's children."""


def main() -> None:
    for process in processes_of(Path(os.environ[MARK])):
        try:
            if process.pid != os.getpid() and process.environ().get(NAME) == os.environ[NAME]:
                process.kill()
        except psutil.NoSuchProcess:
            continue
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
