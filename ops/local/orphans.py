"""Processes of a stack whose supervisor is gone: killed with SIGKILL, or by the kernel for want of memory."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "AFTERIMAGE_STACK"
"""Environment variable of every process of a stack; its value is the `var/` folder."""


def end_orphans(var: Path, *, grace_s: float = 15) -> list[str]:
    """End every process that belongs to the stack in `var`, and return their names.

    Call only while no supervisor of this stack runs.
    """
    found = list(processes_of(var))
    names = [process.name() for process in found]
    for process in found:
        _signal(process, "resume")  # a stopped process does not see SIGTERM
        _signal(process, "terminate")
    _, stubborn = psutil.wait_procs(found, timeout=grace_s)
    for process in stubborn:
        _signal(process, "kill")
    psutil.wait_procs(stubborn, timeout=grace_s)
    return names


def processes_of(var: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(var) or _is_server_in(var, process):
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # ended meanwhile, or someone else's


def _is_server_in(var: Path, process: psutil.Process) -> bool:
    """Postgres and Valkey write their title over their environment; they work inside their data folder instead."""
    return process.name() in ("postgres", "valkey-server") and Path(process.cwd()).parent == var


def _signal(process: psutil.Process, action: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, action)()
