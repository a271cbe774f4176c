"""Helpers for loading models of all kinds: devices, dtypes, digests of weights, and readable errors."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import torch
from torch import nn

from shared.errors import ModelLoadError
from shared.settings import ModelSettings
from worker_service.execution.watchdog import AcceleratorLostError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def prepare_process(settings: ModelSettings) -> None:
    """Apply the settings that count for the whole process: CPU threads, and no requests to any hub when offline."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.offline:
        # huggingface_hub reads its environment variable once, at import, which has happened by now.
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def resolve_device(name: str) -> torch.device:
    """The torch device of a setting. `auto` is the first GPU, or the CPU on a machine without a GPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a setting. `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def weights_digest(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """sha256 over every named tensor of the modules: the same in every process, and different for another dtype."""
    digest = hashlib.sha256()
    for module_name, module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{module_name}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def readable_load_errors(
    kind: str, source: str, *, offline: bool = False, failed: str = "could not be loaded"
) -> Iterator[None]:
    """Turn every exception inside the block into a `ModelLoadError` that names the `source` and the cause.

    The libraries raise a dozen exception types for wrong folders, missing files, wrong shapes and refused downloads.
    kind: kind of model, for the message. offline: the message explains that only local files were searched.
    failed: what went wrong, for the message.

    Raises:
        ModelLoadError: the block raised any exception.
        AcceleratorLostError: the block raised it; only a new process helps.
    """
    try:
        yield
    except (ModelLoadError, AcceleratorLostError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        # Of a list, such as of the tensors with a wrong shape, the first entry.
        cause = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        message = f"{kind} {source!r} {failed}: {type(error).__name__}: {cause}"
        if offline and not Path(source).is_dir():
            message += " (It is not a folder, and model.offline is on, so only the local cache was searched.)"
        raise ModelLoadError(message, model=source) from error
