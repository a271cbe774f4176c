"""References that the request names or brings."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from shared.contracts.generation import PinnedReference
from shared.contracts.jobs import ReferenceKind
from shared.contracts.search import PlannedConcept
from shared.db import images
from shared.db.images import ScoredImage, Vector
from shared.db.spaces import Space
from shared.errors import ReferenceUnavailableError
from shared.retrieval.plan import Candidate, Plan


def plan_pinned(
    session: Session,
    space: Space,
    references: Sequence[PinnedReference],
    vector: Vector | None,
    *,
    sent: Sequence[tuple[ScoredImage, float | None]] = (),
    concepts: Sequence[str] = (),
    kept_reason: str = "found by the search and kept by the request",
) -> Plan:
    """Exactly these references in this order, whatever their similarity.

    A reference that the request only kept from a search is not marked as pinned.

    sent: pictures of the request with their relative weights (None: 1). They come after the corpus images.
    concepts: texts of the concepts of the request, beside those that the references name. kept_reason:
    why images that the request does not pin are used.

    Raises:
        ReferenceUnavailableError: an image was deleted or has no vector in this space.
    """
    found = images.find_by_ids(session, space, [reference.image_id for reference in references], vector)
    missing = [str(reference.image_id) for reference in references if reference.image_id not in found]
    if missing:
        raise ReferenceUnavailableError(image_ids=missing)
    total = sum(_relative(weight) for weight in (*(each.weight for each in references), *(each for _, each in sent)))
    candidates = [
        Candidate(
            scored=found[each.image_id],
            used=True,
            reason="pinned by the request" if each.pinned else kept_reason,
            weight=_relative(each.weight) / total,
            pinned=each.pinned,
            concepts=tuple(each.concepts),
        )
        for each in references
    ]
    candidates += [
        Candidate(
            scored=scored,
            used=True,
            reason="sent with the request",
            weight=_relative(weight) / total,
            pinned=True,
            kind=ReferenceKind.REQUEST,
        )
        for scored, weight in sent
    ]
    texts = dict.fromkeys([*concepts, *(text for each in references for text in each.concepts)])
    return Plan(candidates, [_outcome(text, candidates) for text in texts])


def _outcome(text: str, candidates: Sequence[Candidate]) -> PlannedConcept:
    image_ids = [each.scored.image.id for each in candidates if text in each.concepts]
    reason = None if image_ids else "no reference of the request is for it"
    return PlannedConcept(text=text, found=bool(image_ids), image_ids=image_ids, reason=reason)


def _relative(weight: float | None) -> float:
    return 1.0 if weight is None else weight
