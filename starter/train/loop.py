"""The training loop of all stages: warm-up and constant rate, checkpoints, a JSONL log, an optional cool-down.

The learning rate follows "warm-up, stable, decay" (arXiv:2405.18392). It is constant over any number of runs. A
cool-down starts from the last checkpoint and decays the rate for a short time. Its result is stored separately, so the
constant-rate checkpoint can always be continued.

The randomness of a step depends only on (seed, step), so a killed run continues exactly from its last checkpoint.
"""

import io
import json
import shutil
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm  # type: ignore[import-untyped]

from starter.train.files import replace_folder
from starter.train.optimizer import Optimizer, has_bfloat16

CHECKPOINT = "checkpoint"
COOLED = "cooled"
LOG = "log.jsonl"
PART_BYTES = 16 * 2**20
"""A checkpoint is a folder of parts of this size, which can be carried to and from a machine that takes small files."""


class Stage(Protocol):
    """The interface of a model in training."""

    name: str
    module: nn.Module

    def optimizer(self) -> Optimizer:
        """Return a new optimiser for the module, with all groups at the full rate."""

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Sample a batch with torch's global generator; return the loss (a float32 scalar) and figures for the log."""

    def after_step(self, step: int) -> None:
        """Called after each optimiser step: averages of weights, clamps."""

    def extra_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, besides the module and the optimiser."""

    def load_extra_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How to train. steps: total number of steps at which the run stops, without the cool-down."""

    steps: int
    seed: int = 0
    warmup: int = 200
    cooldown: int = 0
    minutes: float = float("inf")
    checkpoint_every_s: float = 240.0
    log_every: int = 20
    clip_grad_norm: float = 1.0
    bf16: bool | None = None


def autocast(bf16: bool | None) -> AbstractContextManager[Any]:
    """Use bfloat16 matrix products on an accelerator, and on a CPU that has instructions for them; else float32.

    On such CPUs they are 2.5 to 7 times faster.
    """
    device = torch.get_default_device().type
    return torch.autocast(device, torch.bfloat16, enabled=has_bfloat16() if bf16 is None else bf16)


def attention_kernel() -> AbstractContextManager[Any]:
    """On CPUs, the backward pass of the flash kernel takes twice as long as plain products at these sizes."""
    return sdpa_kernel(SDPBackend.MATH) if torch.get_default_device().type == "cpu" else nullcontext()


def train(stage: Stage, folder: Path, plan: Plan) -> int:
    """Train up to `plan.steps`, from the checkpoint in `folder` if it exists; return the total number of steps.

    With `plan.cooldown`, that many further steps decay the rate to zero. Their result is saved as `cooled`;
    `checkpoint` is not changed. SIGTERM and SIGINT save a checkpoint and end the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = stage.optimizer()
    full_rates = [group["lr"] for group in optimizer.param_groups]
    done = load_checkpoint(stage, folder / CHECKPOINT, optimizer)
    deadline = time.monotonic() + plan.minutes * 60
    with StopSignal() as stop, open(folder / LOG, "a", encoding="utf-8") as log:
        saved_at = time.monotonic()
        bar = tqdm(range(done, plan.steps), desc=stage.name, initial=done, total=plan.steps, mininterval=10)
        for step in bar:
            rate = min(1.0, (step + 1) / max(1, plan.warmup))
            set_rates(optimizer, full_rates, rate)
            figures = run_step(stage, optimizer, step, plan)
            done = step + 1
            if done % plan.log_every == 0:
                write_line(log, step=done, rate=rate, **figures)
                bar.set_postfix(figures)
            if time.monotonic() - saved_at > plan.checkpoint_every_s:
                save_checkpoint(stage, folder / CHECKPOINT, optimizer, done)
                saved_at = time.monotonic()
            if stop.requested or time.monotonic() > deadline:
                break
        save_checkpoint(stage, folder / CHECKPOINT, optimizer, done)
        if plan.cooldown and not stop.requested:
            for index in tqdm(range(plan.cooldown), desc=f"{stage.name} cool-down", mininterval=10):
                if stop.requested:
                    return done  # a partial cool-down is useless, and the checkpoint is already saved
                rate = 1 - (index / plan.cooldown) ** 0.5  # "1-sqrt"
                set_rates(optimizer, full_rates, rate)
                figures = run_step(stage, optimizer, done + index, plan)
                if (index + 1) % plan.log_every == 0:
                    write_line(log, step=done + index + 1, rate=rate, cooldown=True, **figures)
            save_checkpoint(stage, folder / COOLED, optimizer, done + plan.cooldown)
    return done


def set_rates(optimizer: Optimizer, full_rates: list[float], share: float) -> None:
    for group, full in zip(optimizer.param_groups, full_rates, strict=True):
        group["lr"] = share * full


def run_step(stage: Stage, optimizer: Optimizer, step: int, plan: Plan) -> dict[str, float]:
    torch.manual_seed(plan.seed * 1_000_003 + step)
    with attention_kernel():
        with autocast(plan.bf16):
            loss, figures = stage.loss(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(stage.module.parameters(), plan.clip_grad_norm)
    if torch.isfinite(norm):
        optimizer.step()
    stage.after_step(step)
    return {"loss": loss.item(), "grad_norm": norm.item(), **figures}


def save_checkpoint(stage: Stage, path: Path, optimizer: Optimizer, step: int) -> None:
    """Write a checkpoint into the folder `path`. `load_checkpoint` finds it or the old one after any kill."""
    state = {
        "step": step,
        "module": stage.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "extra": stage.extra_state(),
    }
    content = io.BytesIO()
    torch.save(state, content)
    partial = path.with_name(path.name + ".new")
    shutil.rmtree(partial, ignore_errors=True)  # a killed run may have left some parts
    partial.mkdir(parents=True)
    view = content.getbuffer()
    for number, start in enumerate(range(0, len(view), PART_BYTES)):
        (partial / f"{number:03d}").write_bytes(view[start : start + PART_BYTES])
    replace_folder(partial, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of the checkpoint in the folder `path`, on the default device."""
    content = io.BytesIO(b"".join(part.read_bytes() for part in sorted(path.iterdir())))
    state: dict[str, Any] = torch.load(content, map_location=torch.get_default_device(), weights_only=True)
    return state


def load_checkpoint(stage: Stage, path: Path, optimizer: Optimizer | None = None) -> int:
    """Restore `stage` (and `optimizer`) from `path`; return its step, or 0 if it does not exist."""
    replaced = path.with_name(path.name + ".old")
    if not path.exists() and replaced.exists():  # killed between the two renames of `replace_folder`
        replaced.rename(path)
    if not path.exists():
        return 0
    state = read_checkpoint(path)
    stage.module.load_state_dict(state["module"])
    stage.load_extra_state(state["extra"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def best_checkpoint(folder: Path) -> Path:
    """Return the path of the cooled-down weights if they are newer than the constant-rate ones, else of the latter."""
    cooled, constant = folder / COOLED, folder / CHECKPOINT
    if cooled.exists() and cooled.stat().st_mtime >= constant.stat().st_mtime:
        return cooled
    return constant


def write_line(log: Any, **figures: float | bool) -> None:
    rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in figures.items()}
    log.write(json.dumps(rounded) + "\n")
    log.flush()


class StopSignal:
    """Context manager that records SIGTERM and SIGINT instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopSignal":
        self._old = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
