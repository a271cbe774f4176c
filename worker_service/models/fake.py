"""A fake generator that takes a configured time per batch, for tests of everything except diffusers."""

import hashlib
import time
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np

from shared.capabilities import resolve_defaults
from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities, ModelDefaults
from shared.settings import ModelSettings
from worker_service.execution.steps import CallStopped, OnStep
from worker_service.models.generation.framing import to_requested_ratio
from worker_service.models.interface import PREVIEW_SIDE, ImageRequest, UnreadTexts, previews_due


@dataclass
class FakeGenerator:
    """Generates coloured blocks that depend on seed, prompt and references. A batch of any size takes `cost_s`."""

    name: str
    capabilities: Capabilities
    defaults: ModelDefaults
    cost_s: float
    """Seconds per batch."""
    reference_dim: int | None = None

    @property
    def has_safety_checker(self) -> bool:
        return False

    @classmethod
    def load(cls, name: str, settings: ModelSettings) -> "FakeGenerator":
        """Build the generator `name` of the settings.

        Raises:
            ModelNotFoundError: the settings have no such generator.
        """
        generator = settings.generator(name)
        defaults = resolve_defaults(generator.defaults, None)
        capabilities = Capabilities(
            modes=[mode.value for mode in Mode if mode is not Mode.AUTO],
            native_width=defaults.width,
            native_height=defaults.height,
            size_multiple=1,
            any_size=True,
            max_batch_size=generator.max_batch_size,
            max_references=generator.max_references,
            schedulers=["euler"],
            loras=sorted(generator.loras),
            supports_negative_prompt=True,
            supports_guidance=True,
            pipeline=cls.__name__,
            weights_digest=hashlib.sha256(cls.__name__.encode()).hexdigest(),
            device="cpu",
            dtype="float32",
            defaults=defaults,
        )
        return cls(name, capabilities, defaults, generator.cost_ms / 1000)

    def warm_up(self) -> None:
        """Do nothing: the first call is not slower than others."""

    def batch_key(self, request: ImageRequest) -> Hashable:
        return request.batch_key()

    def text_parts(self, request: ImageRequest) -> int:
        """Always 1: a text of any length decides the colours."""
        return 1

    def unread_texts(self, request: ImageRequest) -> UnreadTexts:
        return UnreadTexts()

    def reference_call(self, request: ImageRequest) -> None:
        """None: the generator does not read pictures."""

    def memory_savers(self, images: int) -> Sequence[str]:
        """An empty list, because the generator needs no accelerator memory."""
        return ()

    def saving_memory(self, savers: Sequence[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        """Sleep for `cost_s`, divided among the steps, then generate: see `ImageModel.generate`."""
        steps = requests[0].num_inference_steps
        for step in range(1, steps + 1):
            time.sleep(self.cost_s / steps)
            for row, listener in previews_due(requests, step, steps):
                listener.show(_preview(requests[row]), step, steps)
            if not on_step(step, steps):
                raise CallStopped
        return [_blocks(request) for request in requests]

    def detect_unsafe(self, images: Sequence[np.ndarray]) -> list[bool]:
        return [False for _ in images]


def _preview(request: ImageRequest) -> np.ndarray:
    scale = min(1, PREVIEW_SIDE / max(request.width, request.height))
    small = replace(request, width=max(1, int(request.width * scale)), height=max(1, int(request.height * scale)))
    return to_requested_ratio(_blocks(small), request.output_size or (request.width, request.height))


def _blocks(request: ImageRequest) -> np.ndarray:
    """4 x 4 blocks of colour that depend on every input that should change the image: uint8, (height, width, 3)."""
    digest = hashlib.sha256(repr((request.prompt, request.negative_prompt, request.seed, request.mode)).encode())
    for reference in request.references:
        digest.update(repr((reference.weight, reference.caption)).encode())
        if reference.vector is not None:
            digest.update(reference.vector.tobytes())
    colours = np.random.default_rng(list(digest.digest())).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    rows = np.arange(request.height) * 4 // request.height
    columns = np.arange(request.width) * 4 // request.width
    return colours[rows[:, None], columns[None, :]]
