"""The arms of the comparison: one prompt and the same seeds with four choices of references."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from scripts.evaluate.store import Store
from shared import retrieval
from shared.capabilities import drawable_size, resolve_mode
from shared.contracts.generation import Mode, seeds_from
from shared.db.images import Vector
from shared.settings import RetrievalSettings
from worker_service.jobs import outputs
from worker_service.models.interface import ImageModel, ImageRequest


class Arm(StrEnum):
    NONE = "none"
    """The prompt alone."""
    RANDOM = "random"
    """The references of another prompt: separates the effect of retrieval from that of any image."""
    RETRIEVED = "retrieved"
    """The references that the service retrieves."""
    ORACLE = "oracle"
    """Images of the concept itself, as perfect retrieval would give."""


@dataclass(frozen=True)
class Case:
    """One prompt, which is the name of a concept, with the references of each arm."""

    concept: str
    seeds: Sequence[int]
    """The same for every arm."""
    references: Mapping[Arm, Sequence[retrieval.Candidate]]
    """Only used references."""
    prompt: str | None = None
    """None: the concept."""


def build_case(
    concept: str, *, store: Store, queries: Mapping[str, Vector], k: int, seeds: int, settings: RetrievalSettings
) -> Case:
    """Build the case of a concept.

    queries: vector by concept, for every concept of the store; shape (dim,), float32, L2-normalised.
    """
    query = queries[concept]
    digest = hashlib.sha256(concept.encode()).digest()
    return Case(
        concept=concept,
        seeds=seeds_from(int.from_bytes(digest[:4]), seeds),
        references={
            Arm.NONE: [],
            Arm.RANDOM: _random_references(
                concept, np.random.default_rng(list(digest)), store=store, queries=queries, k=k, settings=settings
            ),
            Arm.RETRIEVED: _used(store.plan(query, k=k, settings=settings)),
            Arm.ORACLE: store.pinned_references(concept, query, k=k),
        },
    )


def _random_references(
    concept: str,
    rng: np.random.Generator,
    *,
    store: Store,
    queries: Mapping[str, Vector],
    k: int,
    settings: RetrievalSettings,
) -> list[retrieval.Candidate]:
    """Return the references that the service would use for a random other concept, without images of `concept`."""
    others = [name for name in queries if name != concept]
    for index in rng.permutation(len(others)):
        used = _used(store.plan(queries[others[index]], k=k, settings=settings, not_of=concept))
        if used:
            return used
    return []


def _used(references: Sequence[retrieval.Candidate]) -> list[retrieval.Candidate]:
    return [reference for reference in references if reference.used]


def image_requests(cases: Sequence[Case], arm: Arm, *, model: ImageModel, store: Store) -> Iterator[ImageRequest]:
    """Yield the requests of an arm, case by case, with the generator's defaults for all parameters."""
    defaults = model.defaults
    width, height = drawable_size(model.capabilities, defaults.width, defaults.height)
    for case in cases:
        used = case.references[arm]
        mode, _ = resolve_mode(
            model.capabilities,
            Mode.AUTO,
            references=len(used),
            captions=sum(reference.scored.image.caption is not None for reference in used),
        )
        references = [
            replace(loaded, image=store.image(reference.scored).open())
            for loaded, reference in zip(outputs.load_references(used, with_pixels=False), used, strict=True)
        ]
        for seed in case.seeds:
            yield ImageRequest.of(
                defaults,
                prompt=case.prompt or case.concept,
                seed=seed,
                width=width,
                height=height,
                mode=mode,
                references=references if mode is not Mode.NONE else (),
            )
