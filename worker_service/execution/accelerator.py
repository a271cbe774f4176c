"""Runs calls of torch models, and turns their failures into two errors: out of memory, or accelerator lost."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from shared.errors import BaseAppException, ModelOutOfMemoryError
from worker_service.execution.steps import CallStopped
from worker_service.execution.watchdog import AcceleratorLostError

Result = TypeVar("Result")

OUT_OF_MEMORY_MESSAGES = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""Parts of the messages of CUDA, the CPU's allocator, cuBLAS and cuDNN where they raise a plain RuntimeError."""


def run_on(device: torch.device, call: Callable[[], Result], *, items: int) -> Result:
    """Return `call()`, a model call on `device`. After an out-of-memory error, the memory of the call is free again.

    items: number of texts or images in the call, for the error.

    Raises:
        ModelOutOfMemoryError: the call ran out of memory, and the device still responds.
        AcceleratorLostError: the call failed, and the device no longer responds.
        Exception: every other error of `call`, unchanged.
    """
    cause = ""
    try:
        return call()
    except (CallStopped, BaseAppException):
        raise
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if not any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES):
            if _responds(device):
                raise
            cause = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if not cause:
        # Outside of the except blocks: only here is the traceback gone that kept the call's tensors alive.
        cause = _free_memory(device)
    if cause:
        raise AcceleratorLostError(cause)
    raise ModelOutOfMemoryError(f"{items} item(s) do not fit in memory.", items=items)


def _responds(device: torch.device) -> bool:
    """Whether the device still works: after most CUDA errors every later call of the process fails like the first."""
    try:
        return bool(torch.ones(1, device=device).cpu()[0] == 1)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def _free_memory(device: torch.device) -> str:
    """Return unused memory to the device; an empty text, or the reason why the device is lost."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return "" if _responds(device) else "it does not respond after it ran out of memory"
