"""The models of a generate worker: CLIP and one image model, loaded once and shared by all threads."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities
from shared.db import workers
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import ModelLoadError
from shared.metrics import (
    IMAGE_GENERATION,
    IMAGE_GENERATION_DURATION,
    MODEL_LOAD_DURATION,
    increment_counter,
    time_operation,
)
from shared.settings import GeneratorSettings, SafetySettings, Settings
from worker_service.execution.batcher import Batcher, Submission
from worker_service.execution.watchdog import Stage, Watchdog
from worker_service.models.content_policy import Policy
from worker_service.models.embedder import Embedder
from worker_service.models.engines.generator import OpenAIGenerator
from worker_service.models.fake import FakeGenerator
from worker_service.models.generate_batch import GeneratedImage, generate_batch
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.interface import ImageModel, ImageRequest

logger = logging.getLogger(__name__)

NO_POLICY = SafetySettings()
GENERATORS: dict[str, type[Diffusion] | type[OpenAIGenerator] | type[FakeGenerator]] = {
    "diffusers": Diffusion,
    "openai": OpenAIGenerator,
    "fake": FakeGenerator,
}
"""Generator classes by `kind` in the settings. A new class of `ImageModel` is registered here."""


def require_fitting_clip(image_model: ImageModel, *, clip_name: str, dim: int) -> None:
    """Refuse an image model that conditions on vectors of another length than the CLIP makes.

    Raises:
        ModelLoadError: the lengths differ.
    """
    if image_model.reference_dim not in (None, dim):
        raise ModelLoadError(
            f"The IP-Adapter of {image_model.name!r} takes vectors of length {image_model.reference_dim}, and the CLIP "
            f"{clip_name!r} makes {dim}: it is not the adapter's encoder, so set "
            'ip_adapter.conditions_on to "image".'
        )


@dataclass
class Models:
    """Everything a generate worker needs to run a job."""

    embedder: Embedder
    image_model: ImageModel
    settings: GeneratorSettings
    batcher: Batcher[ImageRequest, GeneratedImage]
    policy: Policy
    crash_isolation_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while an isolated job runs. See "Crash isolation" in `worker_service.jobs.attempt`."""

    @classmethod
    def load(cls, name: str, settings: Settings, watchdog: Watchdog) -> "Models":
        """Load and warm up the models of the generator `name`, and publish its capabilities.

        Raises:
            ModelNotFoundError: the settings have no such generator.
            ModelLoadError: a model cannot be loaded, or the IP-Adapter does not fit CLIP; the message gives the cause.
            DatabaseError: the embedding space or the capabilities cannot be written.
        """
        generator = settings.model.generator(name)
        embedder = Embedder.load(settings, watchdog)
        with time_operation(MODEL_LOAD_DURATION, model=name), watchdog.watch(Stage.LOAD, model=name) as watch:
            image_model: ImageModel = GENERATORS[generator.kind].load(name, settings.model)
            watch.progress(Stage.WARM_UP)
            image_model.warm_up()
        require_fitting_clip(image_model, clip_name=embedder.name, dim=embedder.space.dim)
        with session_scope() as session:
            workers.publish_capabilities(session, name, image_model.capabilities)
        logger.info("generator_loaded", extra={"model": name, "modes": image_model.capabilities.modes})
        return cls.of(
            embedder,
            image_model,
            generator,
            watchdog,
            safety=settings.safety,
            starvation_timeout_s=settings.queue.starvation_timeout_s,
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
        starvation_timeout_s: float = float("inf"),
    ) -> "Models":
        """Put a loaded image model behind a batcher. starvation_timeout_s: see `Batcher`."""
        timed_generate = time_operation(IMAGE_GENERATION_DURATION, model=image_model.name)(
            partial(generate_batch, image_model)
        )
        capabilities = image_model.capabilities
        batcher: Batcher[ImageRequest, GeneratedImage] = Batcher(
            timed_generate,
            key=image_model.batch_key,
            max_batch_size=capabilities.max_batch_size,
            name=image_model.name,
            watchdog=watchdog,
            starvation_timeout_s=starvation_timeout_s,
            concurrency=capabilities.images_at_once,
            interruptible=capabilities.reports_steps and not capabilities.interruption_changes_images,
        )
        policy = Policy.of(safety, settings, embedder.embed, has_checker=image_model.has_safety_checker)
        return cls(embedder, image_model, settings, batcher, policy)

    @property
    def name(self) -> str:
        """Name of the generator in the settings."""
        return self.image_model.name

    @property
    def capabilities(self) -> Capabilities:
        return self.image_model.capabilities

    @property
    def space(self) -> Space:
        """Embedding space of the CLIP model."""
        return self.embedder.space

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """CLIP's projections of texts, in one batch: shape (n, space.dim), float32, not normalised.

        Raises: as `Embedder.embed`.
        """
        vectors: np.ndarray = self.embedder.embed(list(texts))
        return vectors

    def is_available(self) -> bool:
        """Whether the image model can draw now; False while no engine of an `OpenAIGenerator` takes images."""
        return not isinstance(self.image_model, OpenAIGenerator) or self.image_model.is_available()

    def needs_pixels(self, mode: Mode) -> bool:
        """Whether the mode needs the pixels of the references, and not only their vectors."""
        adapter = self.settings.ip_adapter
        takes_vectors = adapter is not None and adapter.conditions_on == "embedding_space"
        traits = mode.traits
        return traits.needs_pixels or (traits.uses_image_prompt and not takes_vectors)

    def generate(self, requests: Sequence[ImageRequest], submission: Submission) -> list[GeneratedImage]:
        """Generate one image per request, in order. Any thread may call it.

        Raises:
            CallStopped: the submission's `check_in` returned False, or the worker closed the models.
            Exception: an error of the submission's `on_start` or of `generate_batch`.
        """
        images = self.batcher.submit(requests, submission)
        increment_counter(IMAGE_GENERATION, len(images), labels={"model": self.name})
        return images

    def close(self, timeout_s: float) -> None:
        """Drop the waiting images, then wait up to `timeout_s` for the running batches of each model."""
        self.batcher.close(timeout_s)
        if isinstance(self.image_model, OpenAIGenerator):
            self.image_model.close()
        self.embedder.close(timeout_s)
