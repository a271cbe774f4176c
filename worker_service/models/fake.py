"""A generator of stated cost for load, chaos and bulk tests: everything but diffusers is real around it."""

import hashlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np

from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities
from shared.errors import ModelNotFoundError
from shared.settings import GeneratorDefaults, ModelSettings
from worker_service.models.interface import PREVIEW_SIDE, ImageRequest, Interrupted, OnStep, to_show


@dataclass
class CheapGenerator:
    """Draws coloured blocks that depend on seed, prompt and references; one batch costs `cost_s`, whatever its size."""

    name: str
    capabilities: Capabilities
    defaults: GeneratorDefaults
    cost_s: float
    reference_dim: int | None = None

    @property
    def has_safety_checker(self) -> bool:
        return False

    @classmethod
    def load(cls, name: str, settings: ModelSettings) -> "CheapGenerator":
        generator = settings.generators.get(name)
        if generator is None:
            raise ModelNotFoundError(model=name)
        capabilities = Capabilities(
            modes=[mode.value for mode in Mode if mode is not Mode.AUTO],
            native_width=generator.defaults.width,
            native_height=generator.defaults.height,
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
        )
        return cls(name, capabilities, generator.defaults, generator.cost_ms / 1000)

    def warm_up(self) -> None:
        """Nothing to pay in advance."""

    def memory_savers(self, images: int) -> Sequence[str]:
        """None: it needs no memory."""
        return ()

    def saving_memory(self, savers: Sequence[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        """Spend the batch's cost over its pretended steps, then draw: see `ImageModel.generate`."""
        steps = requests[0].num_inference_steps
        for step in range(1, steps + 1):
            time.sleep(self.cost_s / steps)
            for row, onlooker in to_show(requests, step, steps):
                onlooker.show(_preview(requests[row]), step, steps)
            if not on_step(step, steps):
                raise Interrupted
        return [_blocks(request) for request in requests]

    def unsafe(self, images: Sequence[np.ndarray]) -> list[bool]:
        return [False for _ in images]


def _preview(request: ImageRequest) -> np.ndarray:
    scale = min(1, PREVIEW_SIDE / max(request.width, request.height))
    small = replace(request, width=max(1, int(request.width * scale)), height=max(1, int(request.height * scale)))
    return _blocks(small)


def _blocks(request: ImageRequest) -> np.ndarray:
    """4x4 blocks of colour, a function of all that should decide the image; uint8, (height, width, 3)."""
    decides = hashlib.sha256(repr((request.prompt, request.negative_prompt, request.seed, request.mode)).encode())
    for reference in request.references:
        decides.update(repr((reference.weight, reference.caption)).encode())
        if reference.vector is not None:
            decides.update(reference.vector.tobytes())
    colours = np.random.default_rng(list(decides.digest())).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    rows = np.arange(request.height) * 4 // request.height
    columns = np.arange(request.width) * 4 // request.width
    return colours[rows[:, None], columns[None, :]]
