"""An image model whose images are drawn by engines elsewhere: servers with OpenAI's image calls.

It sends one call per image, so an engine can draw images of different jobs together. The worker needs no accelerator
for it, only its CLIP.
"""

import hashlib
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from shared.capabilities import resolve_defaults
from shared.contracts.service import Capabilities, ModelDefaults
from shared.errors import ModelLoadError
from shared.settings import GeneratorSettings, ModelSettings
from worker_service.execution.steps import CallStopped, OnStep
from worker_service.models.engines import call, probe
from worker_service.models.engines.pool import Engine, EnginePool
from worker_service.models.interface import ImageRequest, UnreadTexts

CHECK_IN_S = 0.1
"""How often a running call looks whether its job still wants the image."""
START_POLL_S = 1.0
DEFAULT_SIDE = 1024
"""Pixels per side for which models of today are trained, where the settings name no other."""


@dataclass
class OpenAIGenerator:
    """The engines of one generator: an `ImageModel`. Unlike others, it is thread-safe.

    An engine reports no steps. So there is no progress and no preview, and no call is interrupted by another. A call
    whose job is canceled closes its connection; whether the engine then stops is up to the engine.
    """

    name: str
    capabilities: Capabilities
    defaults: ModelDefaults
    settings: GeneratorSettings
    pool: EnginePool

    @classmethod
    def load(cls, name: str, settings: ModelSettings) -> Self:
        """Wait until an engine of the generator `name` answers.

        Raises:
            ModelNotFoundError: the settings have no such generator.
            ModelLoadError: no engine answers within `engine.timeout_s`.
        """
        generator = settings.generator(name)
        engine = generator.engine
        assert engine is not None, "checked by the settings"
        pool = EnginePool(engine, model=name)
        gives_up_at = time.monotonic() + engine.timeout_s
        while not pool.is_available():
            if time.monotonic() > gives_up_at:
                pool.close()
                raise ModelLoadError(f"No engine of {name!r} answers: {', '.join(engine.urls)}.", model=name)
            time.sleep(START_POLL_S)
        side = generator.native_side or DEFAULT_SIDE
        defaults = resolve_defaults(
            generator.defaults, {"width": side, "height": side, "num_inference_steps": 1, "guidance_scale": 0.0}
        )
        digest = engine.digest or hashlib.sha256(f"{engine.model}@{generator.revision}".encode()).hexdigest()
        capabilities = Capabilities(
            modes=list(engine.modes),
            native_width=side,
            native_height=side,
            size_multiple=engine.size_multiple,
            any_size=generator.any_size,
            max_batch_size=1,
            max_references=generator.max_references,
            schedulers=[],
            loras=[],
            supports_negative_prompt=bool(engine.fields["negative_prompt"]),
            supports_guidance=bool(engine.fields["guidance_scale"]),
            pipeline=f"openai:{engine.model}",
            weights_digest=digest,
            weights_digest_kind="stated",
            device="engine",
            dtype="unknown" if generator.dtype == "auto" else generator.dtype,
            defaults=defaults,
            reference_side=generator.reference_side,
            reference_side_of_several=generator.reference_side,
            needs_reference="none" not in engine.modes,
            images_at_once=engine.concurrency * len(engine.urls),
            reports_steps=False,
        )
        return cls(name, capabilities, defaults, generator, pool)

    @property
    def has_safety_checker(self) -> bool:
        """False: a refusal of the engine's own filter is an error."""
        return False

    @property
    def reference_dim(self) -> int | None:
        """None: an engine takes pictures and no vectors."""
        return None

    def warm_up(self) -> None:
        """Draw the first images, and measure whether the engines keep the size and the seed: see `probe`.

        Raises:
            ModelLoadError: an engine cannot draw; the message gives the cause.
        """
        self.capabilities = probe.probe(self)
        if self.capabilities.batching_changes_images:
            self.pool.concurrency = 1

    def is_available(self) -> bool:
        """Whether an engine takes images now."""
        return self.pool.is_available()

    def batch_key(self, request: ImageRequest) -> Hashable:
        return request.batch_key()

    def text_parts(self, request: ImageRequest) -> int:
        """Always 1: the engine gets the whole text."""
        return 1

    def unread_texts(self, request: ImageRequest) -> UnreadTexts:
        """Nothing, because engines do not say how much their model reads."""
        return UnreadTexts()

    def reference_call(self, request: ImageRequest) -> dict[str, Any] | None:
        """The positions of the sent pictures in the request's references, in their order, and their longest side."""
        sent = call.references_of(request, self.settings)
        if not sent:
            return None
        order = [next(i for i, each in enumerate(request.references) if each is one) for one in sent]
        return {"shape": call.EDITS, "order": order, "side": self.settings.reference_side, "fit": "engine"}

    def memory_savers(self, images: int) -> Sequence[str]:
        """An empty list, because the memory is the engine's."""
        return ()

    def saving_memory(self, savers: Sequence[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        """Generate one image per request, all at the same time: see `ImageModel.generate`.

        Raises:
            CallStopped: `on_step` returned False.
            EngineUnavailableError: no engine could draw an image now; a later retry makes sense.
            EngineRefusedError: an engine refused a request.
            InvalidOutputError: an engine returned something that is not an image of the requested size.
        """
        return self.draw(requests, on_step)

    def draw(
        self, requests: Sequence[ImageRequest], on_step: OnStep, *, only: Engine | None = None
    ) -> list[np.ndarray]:
        """As `generate`. only: no other engine gets the requests."""
        prepared = [call.call_for(request, self.settings) for request in requests]
        calls = [self.pool.submit(each, only=only) for each in prepared]
        try:
            while wait(calls, CHECK_IN_S, FIRST_EXCEPTION).not_done:
                if any(each.done() and each.exception() for each in calls):
                    break
                if not on_step(0, requests[0].num_inference_steps):
                    raise CallStopped
            answers = [each.result() for each in calls if each.done()]
        except CancelledError:  # the pool was closed
            raise CallStopped from None
        finally:
            for each in calls:
                each.cancel()
        return [
            call.image_of(answer, width=request.width, height=request.height)
            for answer, request in zip(answers, requests, strict=True)
        ]

    def detect_unsafe(self, images: Sequence[np.ndarray]) -> list[bool]:
        return [False for _ in images]

    def close(self) -> None:
        """Close the connections to the engines."""
        self.pool.close()
