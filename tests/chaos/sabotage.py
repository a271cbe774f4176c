"""What goes wrong inside a generate worker when it is told to (see `orders`), and a note of every image it draws."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from structlog.contextvars import get_contextvars

from shared.errors import ModelOutOfMemoryError
from tests.chaos import orders
from tests.chaos.backstage import Backstage
from worker_service.jobs import attempt
from worker_service.models import loaded
from worker_service.models.diffusion import Diffusion
from worker_service.models.fake import CheapGenerator
from worker_service.models.interface import ImageRequest, OnStep
from worker_service.models.loaded import Models
from worker_service.workers import generate as generate_worker

Generate = Callable[[Sequence[ImageRequest], OnStep], list[np.ndarray]]

backstage = Backstage.of_this_process()


@dataclass(frozen=True, kw_only=True)
class Traced(ImageRequest):
    """A request that knows whose it is."""

    job_id: str
    attempt: int
    index: int


class TracedModels(Models):
    def draw(self, requests: Sequence[ImageRequest], *args: Any, **how: Any) -> Any:
        job = get_contextvars()
        traced = [
            Traced(**vars(request), job_id=job["job_id"], attempt=job["attempt"], index=index)
            for index, request in enumerate(requests)
        ]
        return super().draw(traced, *args, **how)


def sabotaged(generate: Generate, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
    """One call of a generator, with whatever was ordered for it."""

    def step(done: int, total: int) -> bool:
        if done == total // 2 and backstage.takes(orders.MID_BATCH):
            die(orders.MID_BATCH)
        return on_step(done, total)

    prompts = " ".join(request.prompt for request in requests)
    if orders.POISON in prompts:
        die(orders.POISON)
    if orders.TOO_LARGE in prompts or (len(requests) > 1 and backstage.takes(orders.OUT_OF_MEMORY)):
        raise ModelOutOfMemoryError(images=len(requests))
    if backstage.takes(orders.HANG):
        backstage.note(orders.HANG)
        threading.Event().wait()
    images = generate(requests, step)
    if len(requests) > 1 and backstage.takes(orders.WRONG_COUNT):
        return images[1:]
    if orders.GARBAGE in prompts:  # not noted: such a batch fails, and is drawn again in halves
        nan = [np.full(image.shape, np.nan, dtype=np.float32) for image in images]
        return [nan[i] if orders.GARBAGE in request.prompt else images[i] for i, request in enumerate(requests)]
    for request in requests:
        if isinstance(request, Traced):
            backstage.note(orders.DRAWN, job_id=request.job_id, attempt=request.attempt, index=request.index)
    return images


class SabotagedCheap(CheapGenerator):
    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        return sabotaged(super().generate, requests, on_step)


class SabotagedDiffusion(Diffusion):
    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        return sabotaged(super().generate, requests, on_step)


class SabotagedAttempt(attempt.Attempt):
    def finish(self, *result: Any, **more: Any) -> None:
        if backstage.takes(orders.BEFORE_COMMIT):
            die(orders.BEFORE_COMMIT)
        super().finish(*result, **more)
        if backstage.takes(orders.AFTER_COMMIT):
            die(orders.AFTER_COMMIT)


def die(cause: str) -> NoReturn:
    backstage.note(cause)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def install() -> None:
    """Put these in the place of what the worker would use."""
    vars(attempt)["Attempt"] = SabotagedAttempt
    vars(generate_worker)["Models"] = TracedModels
    vars(loaded)["CheapGenerator"] = SabotagedCheap
    vars(loaded)["Diffusion"] = SabotagedDiffusion
