"""End processes of a stack whose supervisor was killed, by SIGKILL or by the kernel's out-of-memory killer."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

STACK_VARIABLE = "AFTERIMAGE_STACK"
"""Environment variable of every process of a stack; its value is the `var/` folder."""


def end_orphans(var: Path, *, grace_s: float = 15) -> list[str]:
    """End every process that belongs to the stack in `var`, and return their names.

    Call only while no supervisor of this stack runs.
    """
    found = list(stack_processes(var))
    names = [process.name() for process in found]
    for process in found:
        _signal(process, "resume")  # a stopped process does not handle SIGTERM
        _signal(process, "terminate")
    _, stubborn = psutil.wait_procs(found, timeout=grace_s)
    for process in stubborn:
        _signal(process, "kill")
    psutil.wait_procs(stubborn, timeout=grace_s)
    return names


def stack_processes(var: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(STACK_VARIABLE) == str(var) or _is_server_in(var, process):
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # the process has ended, or belongs to another user


def _is_server_in(var: Path, process: psutil.Process) -> bool:
    """Recognise servers by their working folder: Postgres and Valkey overwrite their environment with a title."""
    return process.name() in ("postgres", "valkey-server") and Path(process.cwd()).parent == var


def _signal(process: psutil.Process, action: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, action)()
