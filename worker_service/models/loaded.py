"""What a worker process loads once and its threads share: CLIP, and in a generate worker one image model."""

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities
from shared.db import workers
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import ModelLoadError, ModelNotFoundError
from shared.metrics import increment_counter, time_operation
from shared.settings import GeneratorSettings, SafetySettings, Settings
from worker_service.execution.batcher import Batcher, CheckIn
from worker_service.execution.watchdog import Stage, Watchdog
from worker_service.models.content_policy import Policy
from worker_service.models.diffusion import Diffusion
from worker_service.models.embedder import Embedder
from worker_service.models.fake import CheapGenerator
from worker_service.models.generate_batch import Drawn, draw
from worker_service.models.interface import ImageModel, ImageRequest

logger = logging.getLogger(__name__)

NO_POLICY = SafetySettings()


@dataclass
class Models:
    """Everything a generate worker needs to run a job."""

    embedder: Embedder
    image_model: ImageModel
    settings: GeneratorSettings
    batcher: Batcher[ImageRequest, Drawn]
    policy: Policy
    suspects: threading.Lock = field(default_factory=threading.Lock)
    """Held by the one job of this process that may be what killed another process."""

    @classmethod
    def load(cls, name: str, settings: Settings, watchdog: Watchdog) -> "Models":
        """Load and warm what serves the generator `name`, and publish what it can do.

        Raises:
            ModelNotFoundError, ModelLoadError
        """
        generator = settings.model.generators.get(name)
        if generator is None:
            raise ModelNotFoundError(model=name)
        embedder = Embedder.load(settings, watchdog)
        with time_operation("model_load", model=name), watchdog.watch(Stage.LOAD, model=name) as watch:
            image_model: ImageModel = (CheapGenerator if generator.kind == "cheap" else Diffusion).load(
                name, settings.model
            )
            watch.progress(Stage.WARM_UP)
            image_model.warm_up()
        if image_model.reference_dim not in (None, embedder.space.dim):
            raise ModelLoadError(
                f"The IP-Adapter of {name!r} takes vectors of length {image_model.reference_dim}, and the CLIP "
                f"{embedder.name!r} makes {embedder.space.dim}: it is not the adapter's encoder, so set "
                'ip_adapter.conditions_on to "image".'
            )
        with session_scope() as session:
            workers.publish_capabilities(session, name, image_model.capabilities)
        logger.info("generator_loaded", extra={"model": name, "modes": image_model.capabilities.modes})
        return cls.of(
            embedder, image_model, generator, watchdog, safety=settings.safety, starving_s=settings.queue.starving_s
        )

    @classmethod
    def of(
        cls,
        embedder: Embedder,
        image_model: ImageModel,
        settings: GeneratorSettings,
        watchdog: Watchdog,
        *,
        safety: SafetySettings = NO_POLICY,
        starving_s: float = float("inf"),
    ) -> "Models":
        """Loaded models, the image model behind a batcher, in whose line nothing waits longer than `starving_s`
        while others of better lanes keep coming."""
        timed = time_operation("image_generation", model=image_model.name)(partial(draw, image_model))
        batcher: Batcher[ImageRequest, Drawn] = Batcher(
            timed,
            key=ImageRequest.batch_key,
            max_batch_size=image_model.capabilities.max_batch_size,
            name=image_model.name,
            watchdog=watchdog,
            starving_s=starving_s,
        )
        policy = Policy.of(safety, settings, embedder.embed, has_checker=image_model.has_safety_checker)
        return cls(embedder, image_model, settings, batcher, policy)

    @property
    def name(self) -> str:
        return self.image_model.name

    @property
    def capabilities(self) -> Capabilities:
        return self.image_model.capabilities

    @property
    def space(self) -> Space:
        return self.embedder.space

    def embed_text(self, text: str) -> np.ndarray:
        """Shape (space.dim,), float32, not normalised."""
        vector: np.ndarray = self.embedder.embed([text])[0]
        return vector

    def needs_pixels(self, mode: Mode) -> bool:
        """Must references come as images, or are their vectors enough?"""
        adapter = self.settings.ip_adapter
        by_vector = adapter is not None and adapter.conditions_on == "embedding_space"
        return mode.uses_initial_image or mode is Mode.REFERENCE or (mode.uses_image_prompt and not by_vector)

    def draw(
        self,
        requests: Sequence[ImageRequest],
        *,
        lane: int,
        owner: Hashable,
        check_in: CheckIn,
        begin: Callable[[], None],
        held_up: Callable[[float], None],
        alone: bool,
        job: str,
    ) -> list[Drawn]:
        """One image per request; see `Batcher.submit` for what it takes and raises."""
        images = self.batcher.submit(
            requests, lane=lane, owner=owner, check_in=check_in, begin=begin, held_up=held_up, alone=alone, job=job
        )
        increment_counter("image_generation_total", len(images), labels={"model": self.name})
        return images

    def close(self, timeout_s: float) -> None:
        self.batcher.close(timeout_s)
        self.embedder.close(timeout_s)
