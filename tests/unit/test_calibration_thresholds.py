"""The relevance gate, and the choice of its thresholds from measured searches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.calibrate.thresholds import MAX_FALSE_ACCEPTS, MIN_PRECISION, Found, Searches, choose, figures_of
from shared.contracts.calibration import Thresholds
from shared.db.images import ScoredImage
from shared.db.tables import Image
from shared.retrieval.gate import DEFAULT_MIN_SIMILARITY, Gate, resolve_gate

CALIBRATED = Thresholds(min_similarity=0.6, max_gap=0.15, matched_min_similarity=0.4)
COSINES = st.floats(-1, 1, allow_nan=False).map(lambda value: round(value, 3))
IMAGES = st.lists(
    st.builds(Found, COSINES, st.sampled_from([0.0, 0.3, 0.6, 1.0]), st.sampled_from([True, False, None])),
    min_size=1,
    max_size=6,
)
SEARCHES = st.builds(
    Searches,
    fitting=st.lists(IMAGES, min_size=1, max_size=12),
    unfitting=st.lists(IMAGES, min_size=1, max_size=12),
    wrong=st.lists(COSINES, min_size=1, max_size=30),
)


def image(similarity: float, word_share: float = 0.0) -> ScoredImage:
    return ScoredImage(Image(), similarity, np.zeros(2, np.float32), 1.0, word_share=word_share)


# --- the gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("similarity", "word_share", "best", "used", "reason"),
    [
        (0.61, 0, 0.7, True, "similarity 0.610 reaches 0.6"),
        (0.59, 0, 0.7, False, "similarity 0.590 is below 0.6"),
        (0.61, 0, 0.82, False, "similarity 0.610 is 0.210 below the best hit, and the limit is 0.15"),
        (0.41, 1, 0.5, True, "similarity 0.410 reaches 0.4, the limit for an image with all words"),
        (0.39, 1, 0.5, False, "similarity 0.390 is below 0.4, the limit for an image with all words"),
        (0.51, 0.5, 0.6, True, "similarity 0.510 reaches 0.5, the limit for an image with 50% of the words"),
        (0.49, 0.5, 0.6, False, "similarity 0.490 is below 0.5, the limit for an image with 50% of the words"),
        (0.71, -0.5, 0.7, True, "similarity 0.710 reaches 0.7, the limit for an image described in other words"),
        (0.69, -0.5, 0.7, False, "similarity 0.690 is below 0.7, the limit for an image described in other words"),
        (float("nan"), 0, 0.7, False, "similarity nan is below 0.6"),
    ],
)
def test_each_decision_has_a_reason_in_plain_words(
    similarity: float, word_share: float, best: float, used: bool, reason: str
) -> None:
    assert Gate.of(CALIBRATED).decide(image(similarity, word_share), best=best) == (used, reason)


def test_the_first_number_is_the_whole_rule_and_the_calibration_comes_after_all_of_them() -> None:
    assert resolve_gate(CALIBRATED, None, 0.3, 0.5) == Gate(0.3)
    assert resolve_gate(CALIBRATED, 0.0, 0.3, 0.5) == Gate(0.0), "0 is a number"
    assert resolve_gate(CALIBRATED, None, None, None) == Gate(0.6, 0.15, 0.4)
    assert resolve_gate(None, None, None, None) == Gate(DEFAULT_MIN_SIMILARITY)


def test_words_change_nothing_without_a_threshold_for_them() -> None:
    assert Gate(0.5).limit(1.0) == 0.5


@given(similarity=COSINES, higher=COSINES, share=st.floats(0, 1), best=COSINES)
def test_a_higher_similarity_is_never_worse_and_nothing_below_the_lowest_limit_is_used(
    similarity: float, higher: float, share: float, best: float
) -> None:
    gate = Gate.of(CALIBRATED)
    similarity, higher = sorted((similarity, higher))
    if gate.passes(similarity, word_share=share, best=best):
        assert gate.passes(higher, word_share=share, best=best)
        assert similarity >= 0.4
        assert gate.passes(similarity, word_share=1.0, best=best), "more words never hurt"


# --- the choice ---------------------------------------------------------------------------------------------------


def separable() -> Searches:
    """Right images score 0.70 to 0.79, and the best wrong ones 0.50 to 0.59."""
    tenths = [number / 100 for number in range(10)]
    return Searches(
        fitting=[[Found(0.7 + x, 1.0, True), Found(0.68 + x, 1.0, True), Found(0.5 + x, 0, False)] for x in tenths],
        unfitting=[[Found(0.5 + x, 0, False)] for x in tenths],
        wrong=[x - 0.05 for x in tenths] * 10,
    )


def test_thresholds_lie_between_wrong_and_right_images() -> None:
    choice = choose(separable(), k=4)
    assert choice.separable
    assert 0.58 < choice.thresholds.min_similarity <= 0.59, "one of ten false accepts is allowed, not two"
    assert choice.thresholds.max_gap == pytest.approx(0.02, abs=0.006)
    assert choice.thresholds.matched_min_similarity == pytest.approx(0.04, abs=0.006), "what wrong pairs reach"
    assert (choice.figures.precision, choice.figures.recall, choice.figures.false_accepts) == (1, 1, 0.1)


def test_a_clip_that_does_not_separate_gets_a_compromise_and_says_so() -> None:
    rng = np.random.default_rng(3)
    both = [[Found(float(value), 0.0, True)] for value in rng.normal(0.3, 0.05, 200)]
    other = [[Found(float(value), 0.0, False)] for value in rng.normal(0.3, 0.05, 200)]
    choice = choose(Searches(both, other, [0.1] * 100), k=4)
    assert not choice.separable
    assert 0 < choice.figures.recall_without_words < 1


def test_unclear_images_do_not_count() -> None:
    clear = separable()
    unclear = [[*found, Found(0.79, 0.0, None)] for found in clear.fitting]
    assert choose(Searches(unclear, clear.unfitting, clear.wrong), k=4).figures.precision == 1


@pytest.mark.parametrize("missing", ["fitting", "unfitting", "wrong"])
def test_searches_of_one_kind_only_are_refused(missing: str) -> None:
    given = separable()
    kinds = {name: [] if name == missing else getattr(given, name) for name in ("fitting", "unfitting", "wrong")}
    with pytest.raises(ValueError, match="needs queries"):
        choose(Searches(**kinds), k=4)


@given(searches=SEARCHES, k=st.integers(1, 4))
def test_a_choice_keeps_its_promises_on_any_searches(searches: Searches, k: int) -> None:
    choice = choose(searches, k=k)
    thresholds, figures = choice.thresholds, choice.figures
    assert thresholds.matched_min_similarity is not None
    assert -1 <= thresholds.matched_min_similarity <= thresholds.min_similarity <= 1
    assert thresholds.max_gap is not None
    assert thresholds.max_gap >= 0
    assert figures == figures_of(Gate.of(thresholds), searches, k=k)
    if choice.separable:
        assert figures.precision >= MIN_PRECISION
        assert figures.false_accepts <= MAX_FALSE_ACCEPTS
    assert figures.recall_without_words <= figures.recall


@given(searches=SEARCHES, one=COSINES, other=COSINES)
def test_a_higher_threshold_never_has_more_recall_or_more_false_accepts(
    searches: Searches, one: float, other: float
) -> None:
    low, high = (figures_of(Gate(value, 0.2, -1.0), searches, k=4) for value in sorted((one, other)))
    assert high.recall <= low.recall
    assert high.false_accepts <= low.false_accepts
