"""Compares the outputs of a replay with the original: how much the pixels differ, and which inputs changed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from shared.contracts.jobs import Change, Replay, ReplayVerdict
from shared.db.attempts import StoredOutput
from shared.db.session import session_scope
from shared.db.tables import Output
from shared.errors import InvalidImageError, OriginalDeletedError, ResourceNotFoundError
from shared.imaging import open_image
from shared.storage import get_blobs
from worker_service.jobs.attempt import Attempt

TOLERANCE_DB = 40.0
"""At this peak signal-to-noise ratio and above, a difference counts as rounding noise. 40 dB is a root-mean-square
error of 1 % of the range."""
DECISIVE_FIELDS = (
    "seed",
    "drawn_width",
    "drawn_height",
    "crop",
    "initial_image_box",
    "reference_call",
    "text_parts",
    "memory_savers",
    "embedding_space",
    "model",
    "versions",
)
"""Keys of a provenance record that decide pixels, without references and parameters: a replay uses the original's
parameters."""
DIGEST_KIND = "model.weights_digest_kind"
"""Missing in records of releases that had digests of tensors only."""
DECISIVE_REFERENCE_FIELDS = ("sha256", "weight", "caption")
WEIGHT_DIGITS = 9
"""Decimal places to which weights are compared. Weights are divided by their sum, and a replay does it once more, which
changes the last bit."""


def compare(attempt: Attempt, stored: Sequence[StoredOutput]) -> None:
    """Compare the outputs of a replay with its original, and store the result in their rows. Other jobs: do nothing.

    Raises:
        OriginalDeletedError: the original or its file was deleted.
        InvalidImageError: the original's file is damaged.
        StorageError: the blob store failed.
    """
    if attempt.replay_of is None:
        return
    with session_scope() as session:
        original = session.get(Output, attempt.replay_of)
    if original is None:
        raise OriginalDeletedError(generation_id=str(attempt.replay_of))
    for each in stored:
        each.output.replay = compare_outputs(original, each.output).model_dump(mode="json")


def compare_outputs(original: Output, replayed: Output) -> Replay:
    """How the pixels of a replayed output compare with the original's, and which inputs changed.

    Raises:
        OriginalDeletedError: the original's file was deleted.
        InvalidImageError: the original's file is damaged.
        StorageError: the blob store failed.
    """
    changed = list(changes(original.provenance, replayed.provenance))
    if replayed.pixels_sha256 == original.pixels_sha256:
        verdict, largest, psnr_db = ReplayVerdict.IDENTICAL, 0, None
    else:
        largest, psnr_db = difference(_pixels(original), _pixels(replayed))
        near = psnr_db is None or psnr_db >= TOLERANCE_DB
        verdict = ReplayVerdict.WITHIN_TOLERANCE if near else ReplayVerdict.DIFFERENT
    return Replay(of=original.id, verdict=verdict, max_difference=largest, psnr_db=psnr_db, changed=changed)


def difference(original: np.ndarray, replayed: np.ndarray) -> tuple[int, float | None]:
    """Largest difference of two images in levels (0 to 255), and their peak signal-to-noise ratio in dB.

    The ratio is 10 log10(255^2 / MSE), rounded to 2 decimals; None for equal images.
    original, replayed: uint8, both of the same shape (height, width, 3).
    """
    differences = np.abs(original.astype(np.int16) - replayed.astype(np.int16))
    mse = float(np.mean(np.square(differences, dtype=np.float64)))
    return int(differences.max()), None if mse == 0 else round(float(10 * np.log10(255**2 / mse)), 2)


def changes(original: Mapping[str, Any], replayed: Mapping[str, Any]) -> Iterator[Change]:
    """Values that decide pixels and differ between two provenance records, sorted by name."""
    # The original comes from the database. As JSON, a tuple of the new record equals the original's list.
    was, now = (dict(_decisive_values(orjson.loads(orjson.dumps(record)))) for record in (original, replayed))
    if was.setdefault(DIGEST_KIND, "tensors") != now.setdefault(DIGEST_KIND, "tensors"):
        # The weights may be the same: the kind is reported as changed, and the digests are not compared.
        was["model.weights_digest"] = now["model.weights_digest"] = None
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            yield Change(what=name, was=was.get(name), now=now.get(name))


def _decisive_values(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in DECISIVE_FIELDS:
        value = record.get(name)
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", part) for key, part in value.items())
        else:
            yield name, value
    yield "safety.policy", (record.get("safety") or {}).get("policy")
    for position, reference in enumerate(record.get("references", [])):
        for name in DECISIVE_REFERENCE_FIELDS:
            value = reference.get(name)
            yield f"references.{position}.{name}", round(value, WEIGHT_DIGITS) if isinstance(value, float) else value


def _pixels(generation: Output) -> np.ndarray:
    """Pixels of the stored file: the pixels from before a lossy encoding are not kept."""
    try:
        return np.asarray(open_image(get_blobs().get(generation.blob_key)))
    except ResourceNotFoundError as error:
        raise OriginalDeletedError(generation_id=str(generation.id)) from error
    except InvalidImageError as error:
        message = "The stored file of the original is damaged."
        raise InvalidImageError(message, generation_id=str(generation.id)) from error
