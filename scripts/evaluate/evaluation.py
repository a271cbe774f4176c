"""The evaluation from start to end: load, retrieve, draw every arm, judge. What is written of it is in `report`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress

from scripts.evaluate import autoencoder, corpus, retrieval_quality, unseen_style
from scripts.evaluate.arms import Arm, case
from scripts.evaluate.corpus import Corpus, Picture
from scripts.evaluate.drawing import Split, draw_and_judge
from scripts.evaluate.judging import Judge, unit
from scripts.evaluate.metrics import Floats
from scripts.evaluate.store import Store
from shared.errors import ConfigurationError
from shared.settings import ClipSettings, Settings
from worker_service.models.clip import Clip
from worker_service.models.diffusion import Diffusion

ROUND_TRIPS = 256
"""Images that the autoencoder is measured on, at most."""
UNSEEN_COVERAGE = 0.9
"""Share of the concepts that the unseen style must draw to count: it knows everyday things, not a shop's catalogue."""


@dataclass(frozen=True)
class Options:
    corpus: Path
    judge: str
    """What open_clip loads."""
    model: str | None
    """Name of a configured generator; none: the default one."""
    concepts: int
    """Per split."""
    seeds: int
    """Per concept."""
    unseen_style: bool
    cache: Path = Path("var/packages")


@dataclass(frozen=True)
class Models:
    clip: Clip
    generator: Diffusion
    judge: Clip

    @classmethod
    def load(cls, options: Options, settings: Settings) -> "Models":
        """Load by the service's own code.

        Raises:
            ModelNotFoundError, ModelLoadError
            ConfigurationError: the judge is the retriever.
        """
        clip = Clip.load(settings.model)
        judge = Clip.load(settings.model.model_copy(update={"clip": ClipSettings(model=options.judge)}))
        if judge.weights_digest == clip.weights_digest:
            raise ConfigurationError("The judge has the retriever's weights: it would only confirm what was retrieved.")
        generator = Diffusion.load(options.model or settings.model.default_generator, settings.model)
        generator.warm_up()
        return cls(clip, generator, judge)


@dataclass(frozen=True)
class Evaluation:
    corpus: Corpus
    queries: Mapping[str, Floats]
    """Vector of each concept's name by the retriever, L2-normalised, shape (dim,), float32."""
    retrieval: dict[str, Any]
    keywords: dict[str, Any] | None
    unseen: dict[str, Any] | str
    """Retrieval in the unseen style, or why it was not measured."""
    psnr_db: list[float]
    splits: dict[str, Split]
    """`seen` and `held_out`, where the corpus has such concepts."""
    whole: Store
    """The corpus with its vectors."""
    store: Store
    """What the arms drew from: the corpus, less the targets where those are of it."""
    targets: Mapping[str, Image.Image]
    """By concept a real image that no arm drew from."""
    k: int
    """References looked for."""


def evaluate(options: Options, settings: Settings, models: Models, progress: Progress) -> Evaluation:
    """Measure everything, write nothing.

    Raises:
        ConfigurationError: the corpus holds no captioned image.
        ModelOutOfMemoryError, InvalidOutputError
    """
    # 1. The corpus, and how well the retriever finds what is in it.
    decoding = progress.add_task("decoding the corpus", total=None)
    given = corpus.read(options.corpus, limits=settings.api, threads=torch.get_num_threads())
    progress.update(decoding, total=1, completed=1)
    names = given.concepts()
    whole = Store.of(given.pictures, _projections(models.clip, given.pictures, progress))
    queries = dict(zip(names, unit(models.clip.encode_text(names)), strict=True))
    retrieval = retrieval_quality.by_name(queries, whole.vectors, [picture.concept for picture in given.pictures])
    retrieval |= retrieval_quality.relevance(whole, queries, settings.retrieval)
    keywords = retrieval_quality.by_keyword(whole, lambda texts: unit(models.clip.encode_text(texts)))

    # 2. Real images to compare with, that no arm may draw from.
    chosen = {
        "seen": corpus.chosen(given.concepts(held_out=False), options.concepts),
        "held_out": corpus.chosen(given.concepts(held_out=True), options.concepts),
    }
    drawings = _unseen_drawings(names, options)
    if isinstance(drawings, str):
        reserved = _reserved(given, {concept for concepts in chosen.values() for concept in concepts})
        targets = {concept: picture.open() for concept, picture in reserved.items()}
        store = whole.without({picture.sha256 for picture in reserved.values()})
        unseen: dict[str, Any] | str = drawings
    else:
        targets, store = drawings, whole
        vectors = unit(models.clip.encode_image(list(drawings.values())))
        unseen = retrieval_quality.by_name(queries, vectors, list(drawings))

    # 3. Draw and judge every arm of every case.
    k = min(settings.retrieval.default_k, models.generator.capabilities.max_references)
    judge = Judge.of(models.judge, names)
    splits = {}
    for split, concepts in chosen.items():
        cases = [
            case(concept, store=store, queries=queries, k=k, seeds=options.seeds, settings=settings.retrieval)
            for concept in concepts
        ]
        if cases:
            bar = progress.add_task(f"drawing {split} concepts", total=len(cases) * options.seeds * len(Arm))
            splits[split] = draw_and_judge(
                cases,
                model=models.generator,
                store=store,
                targets=targets,
                judge=judge,
                on_images=partial(progress.advance, bar),
            )

    # 4. The autoencoder alone, on what the generator has not seen where there is such.
    unfamiliar = ([picture for picture in given.pictures if picture.held_out] or given.pictures)[:ROUND_TRIPS]
    psnr_db = [
        autoencoder.psnr_of_round_trip(models.generator, picture.open())
        for picture in progress.track(unfamiliar, description="autoencoder")
    ]
    return Evaluation(
        corpus=given,
        queries=queries,
        retrieval=retrieval,
        keywords=keywords,
        unseen=unseen,
        psnr_db=psnr_db,
        splits=splits,
        whole=whole,
        store=store,
        targets=targets,
        k=k,
    )


def _projections(clip: Clip, pictures: Sequence[Picture], progress: Progress) -> Floats:
    """Of the pictures by CLIP, not normalised: shape (n, dim), float32."""
    size = clip.max_batch_size
    batches = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    tracked = progress.track(batches, description="embedding the corpus")
    return np.concatenate([clip.encode_image([picture.open() for picture in batch]) for batch in tracked])


def _unseen_drawings(concepts: Sequence[str], options: Options) -> dict[str, Image.Image] | str:
    """The concepts in the unseen style, or why they are not to be had."""
    if not options.unseen_style:
        return "not asked for"
    try:
        drawings = unseen_style.drawings(concepts, cache=options.cache)
    except unseen_style.UnseenStyleUnavailableError as error:
        return str(error)
    if len(drawings) < UNSEEN_COVERAGE * len(concepts):
        return f"{unseen_style.NAME} draws only {len(drawings)} of the {len(concepts)} concepts"
    return drawings


def _reserved(given: Corpus, concepts: set[str]) -> dict[str, Picture]:
    """The last image of each of the concepts that have several."""
    images: dict[str, list[Picture]] = {}
    for picture in given.pictures:
        images.setdefault(picture.concept, []).append(picture)
    return {concept: images[concept][-1] for concept in images if concept in concepts and len(images[concept]) > 1}
