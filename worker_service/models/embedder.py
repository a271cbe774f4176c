"""Embedding for all threads of a worker: CLIP behind a batcher, queries before corpus images."""

import logging
import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from uuid import uuid4

import numpy as np
import torch
from PIL import Image

from shared.db import spaces
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import ModelLoadError
from shared.metrics import (
    EMBEDDING_DURATION,
    EMBEDDING_GENERATION,
    MODEL_LOAD_DURATION,
    increment_counter,
    time_operation,
)
from shared.settings import Settings
from worker_service.execution.batcher import Batcher, Submission
from worker_service.execution.cpu_threads import CpuThreads
from worker_service.execution.watchdog import Stage, Watchdog
from worker_service.models.clip import Clip, ImageInput, mean_of_parts

logger = logging.getLogger(__name__)

QUERY_LANE, CORPUS_LANE = 0, 1
"""Lanes of the batcher: queries run before corpus images, because a caller waits for them."""
MAX_BATCH_S = 0.5
"""Longest batch of images, in seconds, where a query has to wait for the running batch."""
MAX_BACKGROUND_BATCH_S = 1.5
"""Longest batch of images, in seconds, where queries run at the same time. A longer batch is not more efficient, and
it delays the decoding of the next chunk."""

UNKNOWN_SPACE_S = 15.0
"""How long a worker whose embedding space is unknown waits for it to be added, before it ends."""
UNKNOWN_SPACE_POLL_S = 0.5


class Embedder:
    """CLIP behind a batcher. Any thread may call it. Vectors are projections, float32, not normalised."""

    def __init__(self, clip: Clip, space: Space, watchdog: Watchdog, *, cores: int = 0) -> None:
        """Start the batchers.

        cores: CPU cores for the model. With n > 0, up to n batches of images and one batch of queries run at the same
        time and share these cores. With 0, one batch runs at a time, queries first.
        """
        self.space = space
        self.name = clip.name
        self._clip = clip
        self._cpu_threads = CpuThreads(cores) if cores else None
        self.chunks_at_once = max(2, cores)
        """Chunks of images to work on at once: one per running batch. At least two, so that one is decoded while the
        other is embedded."""

        def batcher(max_batch_s: float = MAX_BATCH_S, concurrency: int = 1) -> Batcher[str | ImageInput, np.ndarray]:
            return Batcher(
                time_operation(EMBEDDING_DURATION, model=clip.name)(lambda items, _on_step: self._encode(items)),
                key=type,  # keeps texts and images apart
                max_batch_size=clip.max_batch_size,
                name=clip.name,
                watchdog=watchdog,
                stage=Stage.EMBED,
                max_batch_s=max_batch_s,
                concurrency=concurrency,
            )

        self._queries = batcher()
        self._images = batcher(MAX_BACKGROUND_BATCH_S, cores) if cores else self._queries

    @classmethod
    def load(cls, settings: Settings, watchdog: Watchdog, *, only_model: bool = False) -> "Embedder":
        """Load and warm up CLIP, and find its embedding space. The first space of a database is added.

        only_model: CLIP is the only model of this process, so its batches may use all CPU cores.

        Raises:
            ModelLoadError: CLIP cannot be loaded, or its space is unknown; the message gives the cause.
            DatabaseError: the database failed.
        """
        with time_operation(MODEL_LOAD_DURATION, model="clip"), watchdog.watch(Stage.LOAD, model="clip") as watch:
            clip = Clip.load(settings.model)
            watch.progress(Stage.WARM_UP)
            clip.warm_up()
        space = _find_space(clip)
        logger.info("clip_loaded", extra={"model": clip.name, "space": space.digest[:12], "device": str(clip.device)})
        parallel = only_model and clip.device.type == "cpu"
        return cls(clip, space, watchdog, cores=torch.get_num_threads() if parallel else 0)

    def prepare(self, image: Image.Image) -> ImageInput:
        """Reduce an image to the pixels that the model needs, in this thread, while the model runs: see `Clip.prepare`.

        Raises:
            EmbeddingError: the model's preprocessing cannot take the image.
        """
        with self._cpu_threads.reserve_one() if self._cpu_threads else nullcontext():
            return self._clip.prepare(image)

    def embed(self, items: Sequence[str] | Sequence[ImageInput]) -> np.ndarray:
        """Vectors of the texts or images of a query, before all corpus images; shape (n, space.dim).

        The vector of a long text is the mean of its parts. They are items of their own, so that a batch stays short and
        other queries need not wait for all of them.

        Raises:
            CallStopped: the embedder was closed.
            EmbeddingError: the model returned an invalid vector.
            ModelOutOfMemoryError: a single item does not fit in memory.
        """
        texts = [item for item in items if isinstance(item, str)]
        parts = [self._clip.parts_of_text(text) for text in texts]
        queued = [part for of_text in parts for part in of_text] if texts else items
        vectors = self._stack_and_count(self._queries.submit(queued, Submission(lane=QUERY_LANE, owner=uuid4())))
        return mean_of_parts(parts, vectors) if texts else vectors

    def embed_corpus_images(self, images: Sequence[ImageInput]) -> np.ndarray:
        """Vectors of images, after all waiting queries; shape (n, space.dim).

        Raises: as `embed`.
        """
        return self._stack_and_count(self._images.submit(images, Submission(lane=CORPUS_LANE)))

    def _stack_and_count(self, results: Sequence[np.ndarray]) -> np.ndarray:
        vectors = np.stack(results)
        increment_counter(EMBEDDING_GENERATION, len(vectors), labels={"model": self.name})
        return vectors

    def close(self, timeout_s: float) -> None:
        """Interrupt the waiting items, then wait up to `timeout_s` for the running batches."""
        ends_at = time.monotonic() + timeout_s
        for batcher in dict.fromkeys((self._images, self._queries)):
            batcher.close(max(0, ends_at - time.monotonic()))

    def _encode(self, items: Sequence[str | ImageInput]) -> Sequence[np.ndarray]:
        with self._cpu_threads.share() if self._cpu_threads else nullcontext():
            return encode(self._clip, items)


def _find_space(clip: Clip) -> Space:
    """The embedding space of this CLIP. The first space of a database is added.

    For an unknown space, the error is logged at once. It is raised after `UNKNOWN_SPACE_S`, unless the space was added
    meanwhile. A supervisor that starts the process again and again would otherwise load CLIP without a pause.

    Raises:
        ModelLoadError: the space is unknown; the message says how to add it.
        DatabaseError: the database failed.
    """
    gives_up_at: float | None = None
    while True:
        with session_scope() as session:
            space = spaces.find_or_add_first(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
        if space is not None:
            return space
        message = (
            f"The CLIP {clip.name!r} makes vectors of an unknown embedding space, so this worker refuses to start. "
            "Give it the CLIP of the active space, or add the space: python -m scripts.admin add-space "
            f"{clip.space_digest} --model {shlex.quote(clip.name)} --dim {clip.dim}"
        )
        if gives_up_at is None:
            gives_up_at = time.monotonic() + UNKNOWN_SPACE_S
            logger.error("space_unknown", extra={"model": clip.name, "space": clip.space_digest, "detail": message})
        if time.monotonic() >= gives_up_at:
            raise ModelLoadError(message)
        time.sleep(UNKNOWN_SPACE_POLL_S)


def encode(clip: Clip, items: Sequence[str | ImageInput]) -> Sequence[np.ndarray]:
    """Projections of the items, all texts or all images: each of shape (dim,), float32, not normalised."""
    texts = [item for item in items if isinstance(item, str)]
    images = [item for item in items if not isinstance(item, str)]
    return list(clip.encode_text(texts) if texts else clip.encode_image(images))
