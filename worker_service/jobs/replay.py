"""An output that was drawn again: is it the picture of then, and what has changed since?"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shared.contracts.jobs import Change, Replay, ReplayVerdict
from shared.db.jobs import Output
from shared.db.session import session_scope
from shared.db.tables import Generation
from shared.errors import InvalidImageError, OriginalDeletedError, ResourceNotFoundError
from shared.imaging import open_image
from shared.storage import get_blobs
from worker_service.jobs.attempt import Attempt

TOLERANCE_DB = 40.0
"""From here on a difference counts as noise of the arithmetic; it is a root-mean-square error of 1 % of the range."""
DECIDES = ("seed", "drawn_width", "drawn_height", "memory_savers", "embedding_space", "model", "versions")
"""What of a record decides pixels, beside parameters, which are those of then, and references."""
OF_A_REFERENCE = ("sha256", "weight", "caption")
WEIGHT_DIGITS = 9
"""Weights are shares of their sum: dividing them by it once more moves their last bit."""


def compare(job: Attempt, stored: Sequence[Output]) -> None:
    """Note on the outputs of a replay how they compare with the original; nothing for any other job.

    Raises:
        OriginalDeletedError: there is nothing to compare with any more.
        InvalidImageError: the original's file is damaged.
        StorageError
    """
    if job.replay_of is None:
        return
    with session_scope() as session:
        original = session.get(Generation, job.replay_of)
    if original is None:
        raise OriginalDeletedError(generation_id=str(job.replay_of))
    for output in stored:
        output.generation.replay = report(original, output.generation).model_dump(mode="json")


def report(original: Generation, again: Generation) -> Replay:
    """Raises as `compare`."""
    changed = list(changes(original.provenance, again.provenance))
    if again.pixels_sha256 == original.pixels_sha256:
        verdict, largest, ratio = ReplayVerdict.IDENTICAL, 0, None
    else:
        largest, ratio = difference(_pixels(original), _pixels(again))
        near = ratio is None or ratio >= TOLERANCE_DB
        verdict = ReplayVerdict.WITHIN_TOLERANCE if near else ReplayVerdict.DIFFERENT
    return Replay(of=original.id, verdict=verdict, max_difference=largest, psnr_db=ratio, changed=changed)


def difference(then: np.ndarray, now: np.ndarray) -> tuple[int, float | None]:
    """The largest difference in levels, and 10 log10(255^2 / MSE), the peak signal-to-noise ratio in dB; None: equal.

    then, now: uint8, shape (height, width, 3), the same for both.
    """
    apart = np.abs(then.astype(np.int16) - now.astype(np.int16))
    mean_square = float(np.mean(np.square(apart, dtype=np.float64)))
    return int(apart.max()), None if mean_square == 0 else round(float(10 * np.log10(255**2 / mean_square)), 2)


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """What of two records decides pixels and is not the same in both."""
    was, is_now = dict(_deciding(then)), dict(_deciding(now))
    for what in sorted(was.keys() | is_now.keys()):
        if was.get(what) != is_now.get(what):
            yield Change(what=what, was=was.get(what), now=is_now.get(what))


def _deciding(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in DECIDES:
        value = record.get(name)
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", part) for key, part in value.items())
        else:
            yield name, value
    yield "safety.policy", (record.get("safety") or {}).get("policy")
    for position, reference in enumerate(record.get("references", [])):
        for name in OF_A_REFERENCE:
            value = reference.get(name)
            yield f"references.{position}.{name}", round(value, WEIGHT_DIGITS) if isinstance(value, float) else value


def _pixels(generation: Generation) -> np.ndarray:
    """Of the file as it is stored: the pixels before a lossy encoding are not kept."""
    try:
        return np.asarray(open_image(get_blobs().get(generation.blob_key)))
    except ResourceNotFoundError as error:
        raise OriginalDeletedError(generation_id=str(generation.id)) from error
    except InvalidImageError as error:
        message = "The stored file of the original is damaged."
        raise InvalidImageError(message, generation_id=str(generation.id)) from error
