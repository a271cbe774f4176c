"""Seconds and memory of calls: by images per call, and by references per image."""

import statistics
import time
from collections.abc import Iterator, Sequence

from scripts.try_model import memory
from scripts.try_model.report import Measurement
from scripts.try_model.trial import Trial
from shared.errors import ModelOutOfMemoryError
from worker_service.execution.steps import go_on
from worker_service.models.generate_batch import generate_batch
from worker_service.models.interface import ImageRequest

GAIN = 0.05
"""Share of the seconds per image that a larger batch must save to pay. It makes each job wait for the whole batch."""


def measurements(trial: Trial, *, repeats: int) -> Iterator[Measurement]:
    """Measure batches of 1, 2, 4 ... images, then 1 ... n references, then the most of both.

    The requests of a call differ only in their seeds, as those of one job. repeats: timed calls per measurement.
    """
    largest_batch = trial.capabilities.max_batch_size
    sizes = sorted({*(2**power for power in range(largest_batch.bit_length())), largest_batch})
    for images in sizes:
        yield measure(trial, images, references=0, repeats=repeats)
    plain = len(trial.request(trial.plain_mode).references)
    if trial.weighing_mode is None or plain == len(trial.references):
        return
    for references in range(plain + 1, len(trial.references) + 1):
        yield measure(trial, 1, references=references, repeats=repeats)
    if largest_batch > 1:
        yield measure(trial, largest_batch, references=len(trial.references), repeats=repeats)


def measure(trial: Trial, images: int, *, references: int, repeats: int) -> Measurement:
    """Measure calls of `images` images with this many references each."""
    mode = trial.weighing_mode if references else trial.plain_mode
    assert mode is not None, "references are measured only in a mode that reads them"
    requests = [trial.request(mode, references=references, seed=seed) for seed in range(images)]
    used = len(requests[0].references)
    resets = memory.reset_peak(trial.device)
    try:
        savers = _seconds(trial, requests)[1]  # the first call of a size is slower than others
        seconds = [_seconds(trial, requests)[0] for _ in range(repeats)]
    except ModelOutOfMemoryError:
        return Measurement(images=images, references=used, mode=mode.value, out_of_memory=True)
    return Measurement(
        images=images,
        references=used,
        mode=mode.value,
        seconds_per_image=statistics.median(seconds) / images,
        peak_bytes=memory.peak_bytes(trial.device) if resets else None,
        memory_savers=savers,
    )


def _seconds(trial: Trial, requests: Sequence[ImageRequest]) -> tuple[float, list[str]]:
    """Draw as a worker draws a batch: the seconds it took, and the memory savers it needed."""
    started = time.perf_counter()
    images = generate_batch(trial.model, requests, go_on)
    return time.perf_counter() - started, list(images[0].memory_savers)


def largest_batch_that_pays(measured: Sequence[Measurement]) -> int | None:
    """The images per call above which no larger batch draws an image `GAIN` faster. Without references.

    A batch that needs memory savers does not pay: they change pixels. None: not even one image fits.
    """
    rows = [row for row in measured if row.references == measured[0].references and not row.out_of_memory]
    best: Measurement | None = None
    for row in sorted(rows, key=lambda row: row.images):
        if row.seconds_per_image is None or (best is not None and row.memory_savers):
            continue
        if best is None or row.seconds_per_image <= (1 - GAIN) * (best.seconds_per_image or 0):
            best = row
    return None if best is None else best.images
