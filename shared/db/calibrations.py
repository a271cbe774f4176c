"""Calibrations of the relevance gate, one per embedding space: `scripts.calibrate` measures and stores them."""

import json
import logging
from functools import cache

from pydantic import ValidationError
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.contracts.calibration import Calibration
from shared.contracts.images import ImageState
from shared.db import spaces
from shared.db.spaces import Space
from shared.db.tables import Collection, EmbeddingSpace, Image
from shared.settings import STARTER

logger = logging.getLogger(__name__)

STARTER_FILE = STARTER / "models" / "clip" / "calibration.json"
"""The calibration of the starter CLIP on the starter corpus, with the digest of its space."""
MOST_CHANGE = 0.2
"""Part of the collection's images by which it may grow or shrink before its calibration counts as old."""
COMMAND = "python -m scripts.calibrate"


def find(session: Session, space: Space) -> Calibration | None:
    """The calibration of a space; for the starter CLIP the one that ships, unless another one was measured."""
    row = session.scalar(select(EmbeddingSpace.calibration).where(EmbeddingSpace.id == space.id))
    return of_space(space.digest, row)


def of_space(digest: str, stored: dict[str, object] | None) -> Calibration | None:
    """The calibration of the space with this digest. stored: the one in its row; None: the one that ships."""
    return shipped(digest) if stored is None else _read(stored)


def shipped(digest: str) -> Calibration | None:
    """The calibration that this release brings for the space with this digest: for the one of the starter CLIP."""
    return _shipped().get(digest)


def find_active(session: Session) -> Calibration | None:
    """The calibration of the space that searches use."""
    space = spaces.find_active(session)
    return None if space is None else find(session, space)


def store(session: Session, space: Space, calibration: Calibration | None) -> None:
    """Replace the calibration of a space. None: remove it."""
    value = None if calibration is None else calibration.model_dump(mode="json")
    session.execute(update(EmbeddingSpace).where(EmbeddingSpace.id == space.id).values(calibration=value))


def warning_about(session: Session, space: Space) -> str | None:
    """Why the relevance gate of a space may be wrong, in one line; None: nothing is known."""
    calibration = find(session, space)
    if calibration is None:
        return f"The relevance gate is not calibrated for this embedding space: {COMMAND} measures it."
    known = session.scalar(select(Collection.id).where(Collection.id == calibration.collection_id))
    if known is None:
        return f"The collection of the relevance gate's calibration is gone: {COMMAND} measures another one."
    images = _count_images(session, calibration)
    if not images or abs(images - calibration.images) <= MOST_CHANGE * calibration.images:
        return None
    now = f"more than {images - 1}" if images > _most(calibration) else str(images)
    return (
        f"The relevance gate was calibrated on {calibration.images} images, and the collection has {now} now: "
        f"{COMMAND} measures it again."
    )


def _count_images(session: Session, calibration: Calibration) -> int:
    """The searchable images of the calibrated collection; counting ends just above `MOST_CHANGE`."""
    searchable = (
        select(Image.id)
        .where(Image.collection_id == calibration.collection_id, Image.state == ImageState.READY)
        .limit(_most(calibration) + 1)
    )
    return session.scalar(select(func.count()).select_from(searchable.subquery())) or 0


def _most(calibration: Calibration) -> int:
    return int(calibration.images * (1 + MOST_CHANGE))


def _read(row: dict[str, object]) -> Calibration | None:
    """The calibration in a row. One that another release wrote in an unreadable form counts as absent."""
    try:
        return Calibration.model_validate(row, extra="ignore")
    except ValidationError as error:
        logger.warning("calibration_unreadable", extra={"cause": str(error)})
        return None


@cache
def _shipped() -> dict[str, Calibration]:
    """The calibrations that ship, by the digest of their embedding space."""
    if not STARTER_FILE.exists():
        return {}
    content = json.loads(STARTER_FILE.read_text())
    return {content["space"]: Calibration.model_validate(content["calibration"])}
