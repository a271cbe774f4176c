"""Generate workers whose model fails in the ways that end a process, without Celery around them.

Started as `python -m tests.failing_worker CLIP_FOLDER`. Each line of stdin is one process that runs the first of some
jobs, and the others in line behind it: `{"fault": ..., "jobs": [...], "environment": {...}}`. Its exit status is
printed. They are forks of this one, because importing torch takes seconds.
"""

import json
import os
import re
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
from worker_service.execution.watchdog import AcceleratorLostError, Stage, Watchdog
from worker_service.jobs import run as generation
from worker_service.jobs.leases import Leases
from worker_service.models.embedder import Embedder
from worker_service.models.fake import CheapGenerator
from worker_service.models.interface import ImageRequest, OnStep
from worker_service.models.loaded import Models

FAULTY = "faulty"
"""In a prompt: this image brings the fault of its round with it."""


class FailingGenerator(CheapGenerator):
    fault = ""
    started = threading.Event()

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        self.started.set()
        faulty = any(FAULTY in request.prompt for request in requests)
        if faulty and self.fault == "hang":
            threading.Event().wait()
        if faulty and self.fault == "hold":
            re.match("(a+)+$", "a" * 64 + "b")  # for years, and without letting go of the interpreter
        if faulty and self.fault == "lose":
            raise AcceleratorLostError("CUDA error: an illegal memory access was encountered")
        images = super().generate(requests, on_step)
        if faulty and self.fault == "hang-decoding":
            threading.Event().wait()
        return images


class StuckPicture(Image.Image):
    def convert(self, *_: Any, **__: Any) -> NoReturn:
        threading.Event().wait()
        raise AssertionError("unreachable")


def run(fault: str, job_ids: Sequence[UUID], settings: Settings) -> None:
    with Watchdog(settings.watchdog) as dog, Leases(settings.jobs) as leases:
        if fault == "hang-loading":
            with dog.watch(Stage.LOAD, model="cheap"):
                threading.Event().wait()
        embedder = Embedder.load(settings, dog)
        generator = settings.model.generators["cheap"]
        image_model = FailingGenerator(**vars(CheapGenerator.load("cheap", settings.model)))
        image_model.fault = fault
        models = Models.of(embedder, image_model, generator, dog)
        if fault == "hang-embedding":
            embedder.embed([StuckPicture()])
        with ThreadPoolExecutor(16) as pool:
            ran = []
            for job_id in job_ids:
                ran.append(
                    pool.submit(
                        generation.run, job_id, models=models, leases=leases, settings=settings, worker="failing"
                    )
                )
                image_model.started.wait()
            for each in ran:
                each.result()
        time.sleep(settings.watchdog.step_s * 1.5)  # what only idles must live on
        models.close(5)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if (child := os.fork()) == 0:
            os.environ.update(order["environment"])
            if order["fault"] == "hold":
                watchdog.BLOCKED_S = 1.0
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
