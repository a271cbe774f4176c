"""Memory in use, at rest and at its peak: of a CUDA device, or of this process on a CPU."""

import gc
import re
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to `clear_refs`, it resets the largest resident size of the process (proc(5))."""


def free_unused() -> None:
    """Free the memory of models without references to them, and that of the caches."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bytes_at_rest(device: torch.device) -> int | None:
    """Bytes in use between two calls, without caches; None where this cannot be measured."""
    free_unused()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS") if device.type == "cpu" else None


def reset_peak(device: torch.device) -> bool:
    """Begin a new measurement of the peak; False where this cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    return device.type == "cpu"


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes in use since `reset_peak`, which returned True."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _of_process("VmHWM")


def _of_process(name: str) -> int | None:
    """A size in the status of this process, in bytes; None where the system has no such file."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
