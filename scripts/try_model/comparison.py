"""Compares a generator with another one of the settings, such as the same weights quantised or offloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10

import numpy as np

from scripts.try_model import memory
from scripts.try_model.measurements import measure
from scripts.try_model.report import ComparedImage, Comparison
from scripts.try_model.trial import Trial
from shared.contracts.generation import Mode
from worker_service.jobs.replay import TOLERANCE_DB
from worker_service.models.interface import ImageRequest


@dataclass(frozen=True)
class Drawn:
    """One image per mode, with its request."""

    requests: Sequence[ImageRequest]
    images: Sequence[np.ndarray]
    """Each of shape (1, height, width, 3), floats in [0, 1]."""


def draw_each_mode(trial: Trial) -> Drawn:
    """Draw one image per mode, with all steps and all references.

    Raises: as `ImageModel.generate`, and the errors of the pipeline.
    """
    count = len(trial.references)
    requests = [trial.request(mode, references=0 if mode is Mode.NONE else count) for mode in trial.modes]
    return Drawn(requests, [trial.draw(request) for request in requests])


def compare(drawn: Drawn, other: Trial, *, repeats: int) -> Comparison:
    """Draw the same requests with the other generator, in the modes that it has, and measure one image of it.

    Raises: as `ImageModel.generate`, and the errors of the pipeline.
    """
    measurement = measure(other, 1, references=0, repeats=repeats)
    rest_bytes = memory.bytes_at_rest(other.device)  # after a call, because a CPU reads weights at their first use
    return Comparison(
        model=other.model.name,
        pipeline=other.capabilities.pipeline,
        dtype=other.capabilities.dtype,
        load_s=other.load_s,
        rest_bytes=rest_bytes,
        measurement=measurement,
        images=[
            _compared(request.mode, image, other.draw(request))
            for request, image in zip(drawn.requests, drawn.images, strict=True)
            if request.mode in other.modes
        ],
    )


def _compared(mode: Mode, image: np.ndarray, other: np.ndarray) -> ComparedImage:
    """By peak signal-to-noise ratio, as a replay is compared with its original."""
    mean_square = float(np.square(image.astype(np.float64) - other).mean())
    psnr_db = None if mean_square == 0 else -10 * log10(mean_square)
    return ComparedImage(
        mode=mode.value,
        psnr_db=psnr_db,
        difference=float(np.abs(image - other).max()),
        same=psnr_db is None or psnr_db >= TOLERANCE_DB,
    )
