"""Failpoints of a generate worker, which carry out `orders`, and a note for every generated image."""

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
from tests.chaos.mailbox import Mailbox
from worker_service.execution.batcher import Submission
from worker_service.execution.steps import OnStep
from worker_service.jobs import attempt
from worker_service.models import worker_models
from worker_service.models.fake import FakeGenerator
from worker_service.models.generate_batch import GeneratedImage
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.interface import ImageRequest
from worker_service.models.worker_models import Models
from worker_service.workers import generate as generate_worker

Generate = Callable[[Sequence[ImageRequest], OnStep], list[np.ndarray]]

mailbox = Mailbox.of_this_process()


@dataclass(frozen=True, kw_only=True)
class Traced(ImageRequest):
    """A request with its job, attempt and image index."""

    job_id: str
    attempt: int
    index: int


class TracedModels(Models):
    def generate(self, requests: Sequence[ImageRequest], submission: Submission) -> list[GeneratedImage]:
        job = get_contextvars()
        traced = [
            Traced(**vars(request), job_id=job["job_id"], attempt=job["attempt"], index=index)
            for index, request in enumerate(requests)
        ]
        return super().generate(traced, submission)


def generate_with_faults(generate: Generate, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
    """Call a generator once and inject the ordered faults."""

    def step(done: int, total: int) -> bool:
        if done == total // 2 and mailbox.takes(orders.MID_BATCH):
            die(orders.MID_BATCH)
        return on_step(done, total)

    prompts = " ".join(request.prompt for request in requests)
    if orders.POISON in prompts:
        die(orders.POISON)
    if orders.TOO_LARGE in prompts or (len(requests) > 1 and mailbox.takes(orders.OUT_OF_MEMORY)):
        raise ModelOutOfMemoryError(images=len(requests))
    if mailbox.takes(orders.HANG):
        mailbox.note(orders.HANG)
        threading.Event().wait()
    images = generate(requests, step)
    if len(requests) > 1 and mailbox.takes(orders.WRONG_COUNT):
        return images[1:]
    if orders.GARBAGE in prompts:  # without notes: such a batch fails, and the worker runs its halves again
        nan = [np.full(image.shape, np.nan, dtype=np.float32) for image in images]
        return [nan[i] if orders.GARBAGE in request.prompt else images[i] for i, request in enumerate(requests)]
    for request in requests:
        if isinstance(request, Traced):
            mailbox.note(orders.GENERATED, job_id=request.job_id, attempt=request.attempt, index=request.index)
    return images


class FaultyFake(FakeGenerator):
    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        return generate_with_faults(super().generate, requests, on_step)


class FaultyDiffusion(Diffusion):
    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        return generate_with_faults(super().generate, requests, on_step)


class FaultyAttempt(attempt.Attempt):
    def finish(self, *result: Any, **more: Any) -> None:
        if mailbox.takes(orders.BEFORE_COMMIT):
            die(orders.BEFORE_COMMIT)
        super().finish(*result, **more)
        if mailbox.takes(orders.AFTER_COMMIT):
            die(orders.AFTER_COMMIT)


def die(cause: str) -> NoReturn:
    mailbox.note(cause)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def install() -> None:
    """Replace the classes of the worker by the faulty ones."""
    vars(attempt)["Attempt"] = FaultyAttempt
    vars(generate_worker)["Models"] = TracedModels
    worker_models.GENERATORS.update(fake=FaultyFake, diffusers=FaultyDiffusion)
