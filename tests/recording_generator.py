"""An image model for tests that takes milliseconds and shows what it was asked for."""

from collections.abc import Sequence

import numpy as np

from shared.settings import ModelSettings
from worker_service.execution.steps import OnStep
from worker_service.models.fake import FakeGenerator
from worker_service.models.interface import ImageRequest


class RecordingGenerator(FakeGenerator):
    """The fake generator. It also records its requests, and calls `before` at the start of each call."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(**vars(FakeGenerator.load("cheap", settings)))
        self.received: list[ImageRequest] = []

    def before(self) -> None: ...

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        self.received += requests
        self.before()
        return super().generate(requests, on_step)
