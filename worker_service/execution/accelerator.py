"""What every call of a torch model has in common: how it runs out of memory, and how it loses its device."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from shared.errors import BaseAppException, ModelOutOfMemoryError
from worker_service.execution.watchdog import AcceleratorLostError
from worker_service.models.interface import Interrupted

Result = TypeVar("Result")

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""How CUDA, the CPU's allocator, and cuBLAS and cuDNN say it where they raise a plain RuntimeError."""


def run_on(device: torch.device, call: Callable[[], Result], *, items: int) -> Result:
    """`call()`, which works on `device`; after a failure the memory it held is free again.

    Raises:
        ModelOutOfMemoryError: what it needs for `items` texts or images does not fit.
        AcceleratorLostError: it failed, and the device does not answer any more.
    """
    cause = ""
    try:
        return call()
    except (Interrupted, BaseAppException):
        raise
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            if _answers(device):
                raise
            cause = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    # Only here, outside the except blocks, is the traceback gone that kept the call's tensors alive.
    if not cause:
        cause = _free_memory(device)
    if cause:
        raise AcceleratorLostError(cause)
    raise ModelOutOfMemoryError(f"{items} item(s) do not fit in memory.", items=items)


def _answers(device: torch.device) -> bool:
    """Most CUDA errors stay: every later call of the process fails like the first."""
    try:
        return bool(torch.ones(1, device=device).cpu()[0] == 1)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def _free_memory(device: torch.device) -> str:
    """Give back what is not used; empty, or why the device is lost."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return "" if _answers(device) else "it does not answer after it ran out of memory"
