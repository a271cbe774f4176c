"""CLIP as the threads of a worker share it."""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image

from shared.db import spaces
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.metrics import increment_counter, time_operation
from shared.settings import Settings
from worker_service.execution.batcher import Batcher
from worker_service.execution.cpu_threads import Cores
from worker_service.execution.watchdog import Stage, Watchdog
from worker_service.models.clip import Clip, Picture

logger = logging.getLogger(__name__)

QUERY_LANE, IMAGE_LANE = 0, 1
LONGEST_S = 0.5
"""A search waits for the batch of images that is in the model when it comes."""
LONGEST_BESIDE_S = 1.5
"""Where a search does not wait for it. Longer gains nothing, and of two chunks in work neither is decoded meanwhile."""


class Embedder:
    """CLIP behind a batcher. Vectors are projections, float32, not normalised."""

    def __init__(self, clip: Clip, space: Space, watchdog: Watchdog, *, cores: int = 0) -> None:
        """cores: on which images run side by side, and queries beside them; 0: one call at a time, queries first."""
        self.space = space
        self.name = clip.name
        self._clip = clip
        self._cores = Cores(cores) if cores else None
        self.chunks_at_once = max(2, cores)
        """Chunks of images worth having in work: one for each call, and at least one that is decoded meanwhile."""

        def batcher(longest_s: float = LONGEST_S, at_once: int = 1) -> Batcher[str | Picture, np.ndarray]:
            return Batcher(
                time_operation("embedding", model=clip.name)(lambda items, _on_step: self._encode(items)),
                key=type,  # keeps texts and images apart
                max_batch_size=clip.max_batch_size,
                name=clip.name,
                watchdog=watchdog,
                stage=Stage.EMBED,
                longest_s=longest_s,
                at_once=at_once,
            )

        self._queries = batcher()
        self._images = batcher(LONGEST_BESIDE_S, cores) if cores else self._queries

    @classmethod
    def load(cls, settings: Settings, watchdog: Watchdog, *, alone: bool = False) -> "Embedder":
        """Load and warm CLIP, and register its embedding space. alone: it is the only model of this process.

        Raises:
            ModelLoadError
        """
        with time_operation("model_load", model="clip"), watchdog.watch(Stage.LOAD, model="clip") as watch:
            clip = Clip.load(settings.model)
            watch.progress(Stage.WARM_UP)
            clip.warm_up()
        with session_scope() as session:
            space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
        logger.info("clip_loaded", extra={"model": clip.name, "space": space.digest[:12], "device": str(clip.device)})
        return cls(clip, space, watchdog, cores=torch.get_num_threads() if alone and clip.device.type == "cpu" else 0)

    def prepare(self, image: Image.Image) -> Picture:
        """What the model needs of an image: less than the image, and made while the model works on others."""
        with self._cores.leave_one() if self._cores else nullcontext():
            return self._clip.prepare(image)

    def embed(self, items: Sequence[str] | Sequence[Picture], *, lane: int = QUERY_LANE) -> np.ndarray:
        """Shape (n, space.dim). Texts and images may come from any number of threads."""
        batcher = self._queries if lane == QUERY_LANE else self._images
        vectors = np.stack(batcher.submit(items, lane=lane))
        increment_counter("embedding_generation_total", len(items), labels={"model": self.name})
        return vectors

    def close(self, timeout_s: float) -> None:
        ends_at = time.monotonic() + timeout_s
        for batcher in dict.fromkeys((self._images, self._queries)):
            batcher.close(max(0, ends_at - time.monotonic()))

    def _encode(self, items: Sequence[str | Picture]) -> Sequence[np.ndarray]:
        with self._cores.share() if self._cores else nullcontext():
            return encode(self._clip, items)


def encode(clip: Clip, items: Sequence[str | Picture]) -> Sequence[np.ndarray]:
    """Projections of texts or of images, never of both at once: float32, not normalised."""
    texts = [item for item in items if isinstance(item, str)]
    pictures = [item for item in items if not isinstance(item, str)]
    return list(clip.encode_text(texts) if texts else clip.encode_image(pictures))
