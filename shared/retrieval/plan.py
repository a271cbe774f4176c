"""Chooses references by search: one search per concept, then a few images that cover the concepts.

A concept is a thing that the image shows. A prompt that was not split is one concept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self
from uuid import UUID

import numpy as np
from sqlalchemy.orm import Session

from shared.concepts import heads, wordings
from shared.contracts.jobs import ReferenceKind
from shared.contracts.search import FoundBy, ImageFilter, PlannedConcept, SearchMode
from shared.db import text_search
from shared.db.images import ScoredImage, Vector
from shared.db.spaces import Space
from shared.retrieval.candidates import find_candidates
from shared.retrieval.diversity import is_near_duplicate, without_near_duplicates
from shared.retrieval.gate import ALL_WORDS, Gate
from shared.retrieval.query_vector import combine
from shared.settings import RetrievalSettings

OVERFETCH = 4
"""Candidates fetched per wanted reference, so that enough remain after near-duplicates are removed."""
MIN_DEPTH = 4
"""Distinct images of each concept, at least, among which one that covers several concepts is looked for."""


@dataclass(frozen=True)
class Candidate:
    """A corpus image, or a picture of the request, and the decision whether to use it as a reference.

    weight: its share of the conditioning. The weights of the used candidates sum to 1; the others have 0.
    concepts: texts of the concepts that it is used for or, if it is not used, was found for.
    """

    scored: ScoredImage
    used: bool
    reason: str
    weight: float = 0.0
    pinned: bool = False
    kind: ReferenceKind = ReferenceKind.CORPUS
    concepts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConceptQuery:
    """A concept, and where its references are searched.

    vectors: of its wordings (`shared.concepts.wordings`), each of shape (dim,), float32, L2-normalised.
    k: its largest number of references; None: no limit.
    heads: the vectors of its shorter names (`shared.concepts.heads`), longest first.
    """

    text: str
    vectors: Sequence[Vector]
    collection_id: UUID
    where: ImageFilter
    k: int | None = None
    heads: Mapping[str, Vector] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        text: str,
        vectors: Mapping[str, Vector],
        *,
        collection_id: UUID,
        where: ImageFilter,
        k: int | None = None,
    ) -> Self:
        """The query of a concept. vectors: of `shared.concepts.searched_texts`, by text."""
        return cls(
            text,
            [vectors[wording] for wording in wordings(text)],
            collection_id,
            where,
            k,
            {name: vectors[name] for name in heads(text)},
        )


@dataclass(frozen=True)
class Avoided:
    """Texts that references must not show, and images that must not be references.

    vectors: by text, each of shape (dim,), float32, L2-normalised. image_ids: of these images.
    """

    vectors: Mapping[str, Vector] = field(default_factory=dict)
    image_ids: frozenset[UUID] = frozenset()

    def reason(self, found: ScoredImage) -> str | None:
        """Say why the image is refused: it is nearer to an avoided text than to its concept. `None`: it is not."""
        for text, vector in self.vectors.items():
            if (similarity := float(found.vector @ vector)) >= found.similarity:
                return f"it is nearer to “{text}”, which the request avoids ({similarity:.3f})"
        return None


NOTHING_AVOIDED = Avoided()


@dataclass(frozen=True)
class ConceptImages:
    """The images that the search of a concept found, best first. k: as in `ConceptQuery`.

    refused: reasons by id of images that are not used, whatever their similarity.
    head: the shorter name by which they were found; `None`: the concept itself.
    """

    text: str
    images: Sequence[ScoredImage]
    k: int | None = None
    refused: Mapping[UUID, str] = field(default_factory=dict)
    head: str | None = None

    def passing(self, gate: Gate) -> list[ScoredImage]:
        """The images that are not refused and pass the gate."""
        allowed = [found for found in self.images if found.image.id not in self.refused]
        best = gate.best_of(allowed)
        return [found for found in allowed if gate.passes(found.similarity, word_share=found.word_share, best=best)]


@dataclass(frozen=True)
class Plan:
    """Used candidates in the order of their choice, then the others; and what was found for each concept."""

    candidates: list[Candidate]
    concepts: list[PlannedConcept]

    @property
    def used(self) -> "Plan":
        """The plan without the candidates that are not used."""
        return replace(self, candidates=[candidate for candidate in self.candidates if candidate.used])

    @property
    def unused(self) -> "Plan":
        """The plan of a job that uses no reference after all."""
        unused = {"image_ids": [], "reason": "the mode of the job uses no references"}
        return Plan([], [each.model_copy(update=unused if each.found else {"image_ids": []}) for each in self.concepts])


def plan_concepts(
    session: Session,
    space: Space,
    concepts: Sequence[ConceptQuery],
    *,
    most: int,
    gate: Gate,
    settings: RetrievalSettings,
    mode: SearchMode = SearchMode.HYBRID,
    avoided: Avoided = NOTHING_AVOIDED,
) -> Plan:
    """Search each concept, and choose at most `most` references that cover them. `decide` says how."""
    if most == 0:
        return Plan([], [])
    searched = []
    for concept in concepts:
        search = partial(
            search_concept,
            session,
            space,
            k=depth(most) * OVERFETCH,
            settings=settings,
            mode=mode,
            avoided=avoided,
        )
        found = search(concept)
        if mode is not SearchMode.VECTOR and (head := _find_head(session, concept, found, gate)):
            by_head = search(replace(concept, text=head, vectors=[concept.heads[head]]))
            if by_head.passing(gate):
                found = replace(by_head, text=concept.text, head=head)
        searched.append(found)
    return decide(searched, most=most, gate=gate, settings=settings)


def _find_head(session: Session, concept: ConceptQuery, found: ConceptImages, gate: Gate) -> str | None:
    """The longest name of the concept that a caption has, if no image that passes has all words of the concept."""
    if not concept.heads or any(each.word_share >= ALL_WORDS for each in found.passing(gate)):
        return None
    return text_search.find_name(session, list(concept.heads), collection_id=concept.collection_id, where=concept.where)


def search_concept(
    session: Session,
    space: Space,
    concept: ConceptQuery,
    *,
    k: int,
    settings: RetrievalSettings,
    mode: SearchMode = SearchMode.HYBRID,
    avoided: Avoided = NOTHING_AVOIDED,
) -> ConceptImages:
    """The `k` best images of a concept, by the wording that fits better.

    avoided: its texts move the query away from them. Similarities are those to the concept itself, for the gate.
    """
    unwanted = [(vector, 1 / len(avoided.vectors)) for vector in avoided.vectors.values()]
    by_wording = []
    for vector in concept.vectors:
        moved = combine([(vector, 1)], unwanted)
        found = find_candidates(
            session,
            space,
            text=concept.text,
            vector=vector if moved is None else moved,
            k=k + len(avoided.image_ids),
            mode=mode,
            collection_id=concept.collection_id,
            where=concept.where,
            settings=settings,
            without=list(avoided.vectors),
        )
        kept = [each for each in found.images if each.image.id not in avoided.image_ids][:k]
        by_wording.append(
            [replace(each, similarity=float(each.vector @ vector)) for each in kept] if unwanted else kept
        )
    best = max(by_wording, key=_agreement)
    reasons = ((each.image.id, avoided.reason(each)) for each in best)
    refused = {image_id: reason for image_id, reason in reasons if reason is not None}
    return ConceptImages(concept.text, best, concept.k, refused)


def _agreement(images: Sequence[ScoredImage]) -> tuple[float, float]:
    """How well a wording fits: the best similarity of an image that its words found too, then of any image."""
    by_words = (found.similarity for found in images if FoundBy.TEXT in found.found_by)
    return max(by_words, default=-1.0), max((found.similarity for found in images), default=-1.0)


def depth(most: int) -> int:
    """Number of distinct images of a concept that a plan of `most` references considers."""
    return max(most, MIN_DEPTH)


def decide(concepts: Sequence[ConceptImages], *, most: int, gate: Gate, settings: RetrievalSettings) -> Plan:
    """Choose at most `most` references from the images found for each concept.

    1. Near-duplicates are one image. The best images of each concept remain, and the gate decides on them.
    2. First comes the image that passes the gate of most concepts which have no reference yet. This is the greedy set
       cover (Chvatal, 1979). Of equals, the one that is higher in the order of its concepts comes first, then the one
       whose concept is named first. So the references of a picture with several things come in the prompt's order.
    3. When each concept has a reference, the next images are chosen in this way for the concepts with the fewest.

    Each concept that has references gets an equal share of the weight.
    """
    # 1. The gate of each concept, and one option for each group of near-duplicates.
    shortlists = [_shortlist(each, depth(most), gate, settings) for each in concepts]
    options = _options(shortlists, similarity=settings.duplicate_similarity)

    # 2. and 3. The references.
    limits = [most if each.k is None else each.k for each in concepts]
    counts = [0] * len(concepts)
    chosen: list[_Chosen] = []
    while options and len(chosen) < most:
        open_concepts = {number for number, count in enumerate(counts) if count < limits[number]}
        options = [option for option in options if option.entries.keys() & open_concepts]
        if not options:
            break
        option = _next(options, counts, open_concepts)
        serves = sorted(option.entries.keys() & open_concepts)
        for number in serves:
            counts[number] += 1
        options.remove(option)
        chosen.append(_Chosen(option, serves))

    used = _with_weights(chosen, concepts, temperature=settings.weight_temperature)
    listed = -(-most // max(1, len(concepts)))
    unused = _unused(shortlists, concepts, chosen, listed=listed, most=most, similarity=settings.duplicate_similarity)
    return Plan(
        used + unused,
        [_outcome(each, shortlist, used, most) for each, shortlist in zip(concepts, shortlists, strict=True)],
    )


@dataclass(frozen=True)
class _Entry:
    """An image in the shortlist of a concept, and the gate's decision on it. rank: 0 is the best."""

    scored: ScoredImage
    rank: int
    passed: bool
    reason: str


@dataclass(eq=False)
class _Option:
    """An image that can be chosen. entries: by number of the concept; of the image, or of a near-duplicate."""

    scored: ScoredImage
    entries: dict[int, _Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class _Chosen:
    """A chosen image. serves: numbers of the concepts that it is used for."""

    option: _Option
    serves: Sequence[int]


def _shortlist(concept: ConceptImages, size: int, gate: Gate, settings: RetrievalSettings) -> list[_Entry]:
    best = gate.best_of(found for found in concept.images if found.image.id not in concept.refused)
    searched_as = "" if concept.head is None else f"; searched as “{concept.head}”"
    distinct = without_near_duplicates(concept.images, similarity=settings.duplicate_similarity)[:size]
    decisions = (
        (False, refused) if (refused := concept.refused.get(found.image.id)) else gate.decide(found, best=best)
        for found in distinct
    )
    return [
        _Entry(found, rank, passed, reason + searched_as)
        for rank, (found, (passed, reason)) in enumerate(zip(distinct, decisions, strict=True))
    ]


def _options(shortlists: Sequence[Sequence[_Entry]], *, similarity: float) -> list[_Option]:
    """Return the images that passed a gate. Of near-duplicates it is the most similar one, for the concepts of all."""
    passed = [(number, entry) for number, entries in enumerate(shortlists) for entry in entries if entry.passed]
    options: list[_Option] = []
    for number, entry in sorted(passed, key=lambda each: (-each[1].scored.similarity, each[0], each[1].rank)):
        option = next((each for each in options if is_near_duplicate(each.scored, entry.scored, similarity)), None)
        if option is None:
            options.append(option := _Option(entry.scored))
        option.entries.setdefault(number, entry)
    return options


def _next(options: Sequence[_Option], counts: Sequence[int], open_concepts: set[int]) -> _Option:
    fewest = min(counts[number] for option in options for number in option.entries.keys() & open_concepts)
    wanting = {number for number in open_concepts if counts[number] == fewest}

    def merit(option: _Option) -> tuple[int, int, int]:
        entries = {number: entry for number, entry in option.entries.items() if number in wanting}
        ranks = sum(entry.rank for entry in entries.values())
        return len(entries), -ranks, -min(entries, default=len(counts))

    return max(options, key=merit)


def _with_weights(
    chosen: Sequence[_Chosen], concepts: Sequence[ConceptImages], *, temperature: float
) -> list[Candidate]:
    """Return the chosen images as candidates. In a concept's share, weights are the softmax of the similarities."""
    weights = np.zeros(len(chosen))
    served = {number for each in chosen for number in each.serves}
    for number in served:
        positions = [position for position, each in enumerate(chosen) if number in each.serves]
        similarities = np.array([chosen[position].option.entries[number].scored.similarity for position in positions])
        shares = np.exp((similarities - similarities.max()) / temperature)
        weights[positions] += shares / shares.sum() / len(served)
    candidates = []
    for each, weight in zip(chosen, weights, strict=True):
        best = max((each.option.entries[number] for number in each.serves), key=lambda entry: entry.scored.similarity)
        candidates.append(
            Candidate(
                scored=best.scored,
                used=True,
                reason=best.reason,
                weight=float(weight),
                concepts=tuple(concepts[number].text for number in each.serves),
            )
        )
    return candidates


def _unused(
    shortlists: Sequence[Sequence[_Entry]],
    concepts: Sequence[ConceptImages],
    chosen: Sequence[_Chosen],
    *,
    listed: int,
    most: int,
    similarity: float,
) -> list[Candidate]:
    """Return the best `listed` images of each concept that are not used, each once, with the reason."""
    shown = [each.option.scored for each in chosen]
    candidates: dict[UUID, Candidate] = {}
    for concept, shortlist in zip(concepts, shortlists, strict=True):
        for entry in shortlist[:listed]:
            if any(is_near_duplicate(entry.scored, other, similarity) for other in shown):
                continue
            image_id = entry.scored.image.id
            known = candidates.get(image_id)
            if known is not None:
                candidates[image_id] = replace(known, concepts=(*known.concepts, concept.text))
                continue
            reason = _no_room(most) if entry.passed else entry.reason
            candidates[image_id] = Candidate(entry.scored, used=False, reason=reason, concepts=(concept.text,))
    return list(candidates.values())


def _outcome(
    concept: ConceptImages, shortlist: Sequence[_Entry], used: Sequence[Candidate], most: int
) -> PlannedConcept:
    image_ids = [each.scored.image.id for each in used if concept.text in each.concepts]
    passed = any(entry.passed for entry in shortlist)
    reason = None
    if not image_ids:
        nearest = max(shortlist, key=lambda entry: entry.scored.similarity, default=None)
        reason = _no_room(most) if passed else "no image matches the filter" if nearest is None else nearest.reason
    return PlannedConcept(text=concept.text, found=passed, image_ids=image_ids, reason=reason)


def _no_room(most: int) -> str:
    return f"other references come first, and at most {most} are used"
