"""The whole evaluation: read the corpus, retrieve references, generate every arm, judge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress

from scripts.evaluate import autoencoder, colours, retrieval_quality, unseen_style
from scripts.evaluate.arms import Arm, build_case
from scripts.evaluate.corpus import Corpus, CorpusImage, choose_concepts, read_corpus
from scripts.evaluate.judge import Judge
from scripts.evaluate.metrics import Floats
from scripts.evaluate.splits import Split, measure_split
from scripts.evaluate.store import Store
from shared.errors import ConfigurationError
from shared.settings import ClipSettings, Settings
from shared.vectors import l2_normalised
from worker_service.models.clip import Clip
from worker_service.models.generation.diffusion import Diffusion

ROUND_TRIPS = 256
"""Most images for the measurement of the autoencoder."""
UNSEEN_COVERAGE = 0.9
"""Least share of concepts with a drawing in the unseen style. It has everyday things, but not a shop's catalogue."""


@dataclass(frozen=True)
class Options:
    corpus: Path
    judge: str
    """Model name for open_clip."""
    model: str | None
    """Name of a configured generator; None: the default generator."""
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
        """Load the models with the service's code.

        Raises:
            ModelNotFoundError: the settings have no generator of that name.
            ModelLoadError: a model cannot be loaded.
            ConfigurationError: the judge has the retriever's weights.
        """
        clip = Clip.load(settings.model)
        judge = Clip.load(settings.model.model_copy(update={"clip": ClipSettings(model=options.judge)}))
        if judge.weights_digest == clip.weights_digest:
            raise ConfigurationError(
                "The judge has the weights of the retriever, so it cannot judge the retrieval independently."
            )
        generator = Diffusion.load(options.model or settings.model.default_generator, settings.model)
        generator.warm_up()
        return cls(clip, generator, judge)


@dataclass(frozen=True)
class Evaluation:
    corpus: Corpus
    queries: Mapping[str, Floats]
    """The retriever's vector of each concept's name, L2-normalised, shape (dim,), float32."""
    retrieval: dict[str, Any]
    keywords: dict[str, Any] | None
    unseen: dict[str, Any] | str
    """Figures of retrieval in the unseen style, or the reason why they were not measured."""
    psnr_db: list[float]
    splits: dict[str, Split]
    """By name: `seen` and `held_out`, if the corpus has such concepts."""
    colours: dict[str, dict[str, Any]]
    """By split: whether the image follows a colour of the prompt that its reference does not have."""
    full_store: Store
    """The corpus with its vectors."""
    store: Store
    """The images that the arms may use: the corpus without the targets that come from it."""
    targets: Mapping[str, Image.Image]
    """By concept: a real image that no arm may use."""
    k: int
    """Most references per image."""


def evaluate(options: Options, settings: Settings, models: Models, progress: Progress) -> Evaluation:
    """Run the evaluation without writing files.

    Raises:
        ConfigurationError: the corpus has no image with a caption.
        ModelOutOfMemoryError: a batch does not fit in memory.
        InvalidOutputError: the generator produced an image that is not valid.
    """
    # 1. Read the corpus and measure the retriever on it.
    corpus, full_store = read_store(options.corpus, settings, models.clip, progress)
    names = corpus.concepts()
    queries = dict(zip(names, l2_normalised(models.clip.encode_text(names)), strict=True))
    retrieval = retrieval_quality.recall_by_name(
        queries, full_store.vectors, [image.concept for image in corpus.images]
    )
    retrieval |= retrieval_quality.relevance_figures(full_store, queries, settings.retrieval)
    keywords = retrieval_quality.precision_by_keyword(
        full_store, lambda texts: l2_normalised(models.clip.encode_text(texts))
    )

    # 2. Choose concepts, and real images for comparison that no arm may use.
    concepts_by_split = {
        "seen": choose_concepts(corpus.concepts(held_out=False), options.concepts),
        "held_out": choose_concepts(corpus.concepts(held_out=True), options.concepts),
    }
    drawings = _unseen_style_drawings(names, options)
    if isinstance(drawings, str):
        reserved = _reserve_targets(corpus, {name for chosen in concepts_by_split.values() for name in chosen})
        targets = {concept: image.open() for concept, image in reserved.items()}
        store = full_store.without({image.sha256 for image in reserved.values()})
        unseen: dict[str, Any] | str = drawings
    else:
        targets, store = drawings, full_store
        vectors = l2_normalised(models.clip.encode_image(list(drawings.values())))
        unseen = retrieval_quality.recall_by_name(queries, vectors, list(drawings))

    # 3. Generate and judge every arm of every case.
    k = min(settings.retrieval.default_k, models.generator.capabilities.max_references)
    judge = Judge.of(models.judge, names)
    splits = {}
    for split, concepts in concepts_by_split.items():
        cases = [
            build_case(concept, store=store, queries=queries, k=k, seeds=options.seeds, settings=settings.retrieval)
            for concept in concepts
        ]
        if cases:
            bar = progress.add_task(f"generating {split} concepts", total=len(cases) * options.seeds * len(Arm))
            splits[split] = measure_split(
                cases,
                model=models.generator,
                store=store,
                targets=targets,
                judge=judge,
                on_images=partial(progress.advance, bar),
            )

    # 4. Generate things in other colours than their references have.
    followed = {}
    for split, concepts in concepts_by_split.items():
        if coloured := colours.cases(concepts, store, queries):
            bar = progress.add_task(f"generating {split} concepts in other colours", total=len(coloured))
            followed[split] = colours.figures(
                coloured, model=models.generator, store=store, judge=judge, on_images=partial(progress.advance, bar)
            )

    # 5. Measure the autoencoder alone, on held-out images if the corpus has some.
    test_images = ([image for image in corpus.images if image.held_out] or corpus.images)[:ROUND_TRIPS]
    psnr_db = [
        autoencoder.psnr_of_round_trip(models.generator, image.open())
        for image in progress.track(test_images, description="autoencoder")
    ]
    return Evaluation(
        corpus=corpus,
        queries=queries,
        retrieval=retrieval,
        keywords=keywords,
        unseen=unseen,
        psnr_db=psnr_db,
        splits=splits,
        colours=followed,
        full_store=full_store,
        store=store,
        targets=targets,
        k=k,
    )


def read_store(path: Path, settings: Settings, clip: Clip, progress: Progress) -> tuple[Corpus, Store]:
    """Read a corpus and embed its images.

    Raises:
        ConfigurationError: the corpus has no image with a caption.
    """
    decoding = progress.add_task("decoding the corpus", total=None)
    corpus = read_corpus(path, limits=settings.api, threads=torch.get_num_threads())
    progress.update(decoding, total=1, completed=1)
    return corpus, Store.of(corpus.images, _embed_images(clip, corpus.images, progress))


def _embed_images(clip: Clip, images: Sequence[CorpusImage], progress: Progress) -> Floats:
    """Return the CLIP vectors of the images, not normalised: shape (n, dim), float32."""
    size = clip.max_batch_size
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    tracked = progress.track(batches, description="embedding the corpus")
    return np.concatenate([clip.encode_image([image.open() for image in batch]) for batch in tracked])


def _unseen_style_drawings(concepts: Sequence[str], options: Options) -> dict[str, Image.Image] | str:
    """Return drawings of the concepts in the unseen style, or the reason for having none."""
    if not options.unseen_style:
        return "not requested"
    try:
        drawings = unseen_style.render_concepts(concepts, cache=options.cache)
    except unseen_style.UnseenStyleUnavailableError as error:
        return str(error)
    if len(drawings) < UNSEEN_COVERAGE * len(concepts):
        return f"{unseen_style.NAME} has only {len(drawings)} of the {len(concepts)} concepts"
    return drawings


def _reserve_targets(corpus: Corpus, concepts: set[str]) -> dict[str, CorpusImage]:
    """Return the last image of each concept that has several."""
    images: dict[str, list[CorpusImage]] = {}
    for image in corpus.images:
        images.setdefault(image.concept, []).append(image)
    return {concept: images[concept][-1] for concept in images if concept in concepts and len(images[concept]) > 1}
