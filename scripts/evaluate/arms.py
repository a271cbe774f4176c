"""What is compared: one prompt drawn from the same seeds with four choices of references."""

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
    """What another prompt retrieves: tells retrieval from having any image at all."""
    RETRIEVED = "retrieved"
    """What the service does."""
    ORACLE = "oracle"
    """The concept's own images: what perfect retrieval would give."""


@dataclass(frozen=True)
class Case:
    """One prompt, the name of its concept, and the references that each arm draws from."""

    concept: str
    seeds: Sequence[int]
    """The same for every arm."""
    references: Mapping[Arm, Sequence[retrieval.Reference]]
    """The used ones."""


def case(
    concept: str, *, store: Store, queries: Mapping[str, Vector], k: int, seeds: int, settings: RetrievalSettings
) -> Case:
    """The case of a concept. queries: of every concept of the store, shape (dim,), float32, L2-normalised."""
    query = queries[concept]
    digest = hashlib.sha256(concept.encode()).digest()
    return Case(
        concept=concept,
        seeds=seeds_from(int.from_bytes(digest[:4]), seeds),
        references={
            Arm.NONE: [],
            Arm.RANDOM: _of_another_prompt(
                concept, np.random.default_rng(list(digest)), store=store, queries=queries, k=k, settings=settings
            ),
            Arm.RETRIEVED: _used(store.plan(query, k=k, settings=settings)),
            Arm.ORACLE: store.own(concept, query, k=k),
        },
    )


def _of_another_prompt(
    concept: str,
    rng: np.random.Generator,
    *,
    store: Store,
    queries: Mapping[str, Vector],
    k: int,
    settings: RetrievalSettings,
) -> list[retrieval.Reference]:
    """What the service would use for a concept drawn by lot, without images of `concept`."""
    others = [name for name in queries if name != concept]
    for index in rng.permutation(len(others)):
        used = _used(store.plan(queries[others[index]], k=k, settings=settings, not_of=concept))
        if used:
            return used
    return []


def _used(references: Sequence[retrieval.Reference]) -> list[retrieval.Reference]:
    return [reference for reference in references if reference.used]


def requests(cases: Sequence[Case], arm: Arm, *, model: ImageModel, store: Store) -> Iterator[ImageRequest]:
    """The images of an arm, case by case, asked for as by a job that leaves everything to the defaults."""
    defaults = model.defaults
    width, height = drawable_size(model.capabilities, defaults.width, defaults.height)
    for case in cases:
        used = case.references[arm]
        mode, _ = resolve_mode(
            model.capabilities,
            Mode.AUTO,
            references=len(used),
            captions=sum(reference.found.image.caption is not None for reference in used),
        )
        references = [
            replace(loaded, image=store.picture(reference.found).open())
            for loaded, reference in zip(outputs.load_references(used, with_pixels=False), used, strict=True)
        ]
        for seed in case.seeds:
            yield ImageRequest(
                prompt=case.concept,
                negative_prompt=None,
                seed=seed,
                width=width,
                height=height,
                num_inference_steps=defaults.num_inference_steps,
                guidance_scale=defaults.guidance_scale,
                scheduler=defaults.scheduler,
                loras=(),
                mode=mode,
                ip_adapter_scale=defaults.ip_adapter_scale,
                strength=defaults.strength,
                references=tuple(references) if mode is not Mode.NONE else (),
            )
