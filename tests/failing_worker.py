"""Generate workers whose model fails in the ways that end a process, without Celery.

Run it as `python -m tests.failing_worker CLIP_FOLDER`. Each line of stdin starts one process:
`{"fault": ..., "jobs": [...], "environment": {...}}`. The process runs the first job, with the other jobs queued behind
it. This program then prints the exit status of that process. The processes are forks of this one, because importing
torch takes seconds.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn
from uuid import UUID

import numpy as np
from PIL import Image

from shared import logging as logs
from shared.settings import ClipSettings, Settings, get_settings
from worker_service.execution import watchdog
from worker_service.execution.steps import OnStep
from worker_service.execution.watchdog import AcceleratorLostError, Stage, Watchdog
from worker_service.jobs.leases import JobLeases
from worker_service.jobs.run import run_job
from worker_service.models.clip import ImageInput
from worker_service.models.embedder import Embedder
from worker_service.models.fake import FakeGenerator
from worker_service.models.interface import ImageRequest
from worker_service.models.worker_models import Models

FAULTY = "faulty"
"""In a prompt: the image causes the fault of its process."""


class FailingGenerator(FakeGenerator):
    fault = ""
    started = threading.Event()

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        self.started.set()
        faulty = any(FAULTY in request.prompt for request in requests)
        if faulty and self.fault == "hang":
            threading.Event().wait()
        if faulty and self.fault == "hold":
            re.match("(a+)+$", "a" * 64 + "b")  # runs for years, and never releases the GIL
        if faulty and self.fault == "lose":
            raise AcceleratorLostError("CUDA error: an illegal memory access was encountered")
        images = super().generate(requests, on_step)
        if faulty and self.fault == "hang-decoding":
            threading.Event().wait()
        return images


class FailingEmbedder(Embedder):
    fault = ""

    def embed(self, items: Sequence[str] | Sequence[ImageInput]) -> np.ndarray:
        if self.fault == "die-embedding" and any(FAULTY in item for item in items if isinstance(item, str)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed(items)


class StuckPicture(Image.Image):
    def convert(self, *_: Any, **__: Any) -> NoReturn:
        threading.Event().wait()
        raise AssertionError("unreachable")


def run(fault: str, job_ids: Sequence[UUID], settings: Settings) -> None:
    with Watchdog(settings.watchdog) as stage_watchdog, JobLeases(settings.jobs) as leases:
        if fault == "hang-loading":
            with stage_watchdog.watch(Stage.LOAD, model="cheap"):
                threading.Event().wait()
        embedder = FailingEmbedder.load(settings, stage_watchdog)
        FailingEmbedder.fault = fault
        generator = settings.model.generators["cheap"]
        image_model = FailingGenerator(**vars(FakeGenerator.load("cheap", settings.model)))
        image_model.fault = fault
        models = Models.of(embedder, image_model, generator, stage_watchdog)
        if fault == "hang-embedding":
            embedder.embed([StuckPicture()])
        with ThreadPoolExecutor(16) as pool:
            running = []
            for job_id in job_ids:
                running.append(
                    pool.submit(run_job, job_id, models=models, leases=leases, settings=settings, worker="failing")
                )
                image_model.started.wait()
            for each in running:
                each.result()
        time.sleep(settings.watchdog.step_s * 1.5)  # the watchdog must not end an idle process
        models.close(5)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if (child := os.fork()) == 0:
            os.environ.update(order["environment"])
            if order["fault"] == "hold":
                watchdog.HELD_GIL_GRACE_S = 1.0
            settings = get_settings()
            clip = ClipSettings(model=f"local-dir:{sys.argv[1]}")
            settings = settings.model_copy(update={"model": settings.model.model_copy(update={"clip": clip})})
            logs.configure(settings, service="worker.generate")
            run(order["fault"], [UUID(job_id) for job_id in order["jobs"]], settings)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
