"""How references are chosen for several concepts: the cover, the limits, near-duplicates and weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from uuid import UUID, uuid5

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.contracts.search import FoundBy
from shared.db.images import ScoredImage
from shared.db.tables import Image
from shared.retrieval import Avoided, Candidate, ConceptImages, Gate, Plan, decide
from shared.settings import RetrievalSettings

DIM = 32
SETTINGS = RetrievalSettings()
GATE = Gate(0.4)
NAMESPACE = UUID(int=1)


def found(name: str, similarity: float, *, like: str | None = None, number: int = 0) -> ScoredImage:
    """An image of a search. Images of different names are orthogonal; `like`: nearly the vector of that image."""
    vector = np.zeros(DIM, np.float32)
    vector[sum(map(ord, like or name)) % (DIM - 1)] = 1
    if like is not None:
        vector[DIM - 1] = 0.1
        vector /= np.linalg.norm(vector)
    image = Image(id=uuid5(NAMESPACE, name), caption=name, perceptual_hash=sum(map(ord, name)) * 7919 + number)
    return ScoredImage(image=image, similarity=similarity, vector=vector, norm=1.0)


def concept(text: str, similarities: Mapping[str, float], *, k: int | None = None) -> ConceptImages:
    ranked = sorted(similarities.items(), key=lambda item: -item[1])
    return ConceptImages(text, [found(name, similarity) for name, similarity in ranked], k)


def chosen(plan: Plan) -> list[str]:
    return [str(each.scored.image.caption) for each in plan.candidates if each.used]


def by_name(plan: Plan) -> dict[str, Candidate]:
    return {str(each.scored.image.caption): each for each in plan.candidates}


def decided(concepts: Sequence[ConceptImages], *, most: int = 4, gate: Gate = GATE) -> Plan:
    return decide(concepts, most=most, gate=gate, settings=SETTINGS)


def test_an_image_that_covers_both_concepts_comes_first() -> None:
    robot = concept("a robot", {"a": 0.9, "both": 0.6})
    flower = concept("a flower", {"b": 0.8, "both": 0.5})
    plan = decided([robot, flower], most=1)
    assert chosen(plan) == ["both"]
    (both,) = plan.used.candidates
    assert (both.concepts, both.weight, both.scored.similarity) == (("a robot", "a flower"), 1.0, 0.6)
    assert [each.image_ids for each in plan.concepts] == [[both.scored.image.id]] * 2


def test_each_concept_gets_a_reference_before_one_gets_two() -> None:
    robot = concept("a robot", {"a": 0.9, "b": 0.89, "c": 0.88})
    flower = concept("a flower", {"x": 0.5, "y": 0.45})
    assert chosen(decided([robot, flower], most=2)) == ["a", "x"]
    assert chosen(decided([robot, flower], most=3)) == ["a", "x", "b"]
    assert chosen(decided([robot, flower], most=4)) == ["a", "x", "b", "y"]


def test_references_come_in_the_order_in_which_the_prompt_names_their_concepts() -> None:
    """A model that reads pictures in their order puts the robot where the prompt says."""
    robot = concept("a robot", {"a": 0.5, "b": 0.45})
    flower = concept("a flower", {"x": 0.9, "y": 0.8})
    assert chosen(decided([robot, flower])) == ["a", "x", "b", "y"]


def test_concepts_share_the_weight_equally() -> None:
    plan = decided([concept("a robot", {"a": 0.9, "b": 0.9, "c": 0.9}), concept("a flower", {"x": 0.5})])
    weights = {name: each.weight for name, each in by_name(plan).items()}
    assert weights == pytest.approx({"a": 1 / 6, "b": 1 / 6, "c": 1 / 6, "x": 1 / 2})


def test_a_concept_without_a_relevant_image_is_named_with_the_reason() -> None:
    plan = decided([concept("a robot", {"a": 0.9}), concept("a flower", {"x": 0.3})])
    robot, flower = plan.concepts
    assert (robot.found, robot.reason) == (True, None)
    assert (flower.found, flower.image_ids) == (False, [])
    assert flower.reason is not None
    assert "0.300 is below 0.4" in flower.reason
    assert by_name(plan)["x"].concepts == ("a flower",)
    assert by_name(plan)["a"].weight == 1.0


def test_a_concept_for_which_there_is_no_room_is_found_but_not_used() -> None:
    plan = decided([concept("a robot", {"a": 0.9}), concept("a flower", {"x": 0.8})], most=1)
    flower = plan.concepts[1]
    assert (chosen(plan), flower.found, flower.image_ids) == (["a"], True, [])
    assert "at most 1" in str(flower.reason)


def test_a_concept_of_an_empty_collection_has_a_reason() -> None:
    plan = decided([concept("a robot", {})])
    assert (plan.candidates, plan.concepts[0].found) == ([], False)
    assert plan.concepts[0].reason == "no image matches the filter"


def test_near_duplicates_of_two_concepts_are_one_reference_for_both() -> None:
    twins = [found("one", 0.7), found("two", 0.6, like="one")]
    plan = decided([ConceptImages("a cat", twins[:1]), ConceptImages("a kitten", [twins[1], found("x", 0.5)])])
    assert chosen(plan) == ["one", "x"]
    assert by_name(plan)["one"].concepts == ("a cat", "a kitten")
    assert "two" not in by_name(plan)


def test_a_concept_never_gets_more_references_than_it_asks_for() -> None:
    robot = concept("a robot", {"a": 0.9, "both": 0.8, "c": 0.7}, k=1)
    flower = concept("a flower", {"x": 0.9, "both": 0.85, "y": 0.6})
    plan = decided([robot, flower], most=4)
    assert [len(each.image_ids) for each in plan.concepts] == [1, 3]
    assert by_name(plan)["both"].concepts == ("a robot", "a flower")
    assert not by_name(plan).get("a", Candidate(found("a", 0), used=False, reason="")).used


def test_a_prompt_of_one_concept_uses_the_nearest_images_in_their_order() -> None:
    plan = decided([concept("an apple", {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6, "e": 0.5})], most=3)
    assert [str(each.scored.image.caption) for each in plan.candidates] == ["a", "b", "c"]
    assert all(each.used for each in plan.candidates)


def test_the_gap_is_measured_from_the_best_image_of_the_same_concept() -> None:
    gate = Gate(0.3, max_gap=0.2)
    plan = decided([concept("a robot", {"a": 0.9, "b": 0.6}), concept("a flower", {"x": 0.5, "y": 0.4})], gate=gate)
    assert sorted(chosen(plan)) == ["a", "x", "y"]


def test_images_found_by_words_keep_their_rank() -> None:
    words = ScoredImage(**{**vars(found("dog", 0.45)), "found_by": (FoundBy.TEXT,)})
    plan = decided([ConceptImages("two dogs", [words, found("meat", 0.5)])], most=1)
    assert chosen(plan) == ["dog"]
    assert plan.candidates[0].scored.found_by == (FoundBy.TEXT,)


def test_a_refused_image_is_not_the_best_hit_of_the_gap() -> None:
    rose, tulip = found("rose", 0.75), found("tulip", 0.655)
    flower = ConceptImages("a flower", [rose, tulip], refused={rose.image.id: "avoided"})
    assert chosen(decided([flower], gate=Gate(0.4, max_gap=0.085))) == ["tulip"]


def test_an_image_below_its_own_limit_is_not_the_best_hit_of_the_gap() -> None:
    """A CLIP that prefers a city must not keep the mountains out, which their words have found."""
    mountains = replace(found("mountains", 0.55), word_share=1.0)
    landscape = ConceptImages("a mountain landscape", [replace(found("city", 0.7), word_share=-0.5), mountains])
    gate = Gate(0.64, max_gap=0.085, matched_min_similarity=0.43)
    assert chosen(decided([landscape], gate=gate)) == ["mountains"]
    assert [str(each.image.caption) for each in landscape.passing(gate)] == ["mountains"]


def test_a_concept_gets_the_copy_that_its_own_search_found() -> None:
    """The other copy is more similar, but a filter may have kept it from this concept."""
    first = concept("anything", {"both": 0.9, "copied": 0.8}, k=1)
    second = concept("something", {"both": 0.9})
    free = ConceptImages("a free one", [found("copy", 0.5, like="copied")])
    plan = decided([first, second, free])
    assert chosen(plan) == ["both", "copy"]
    assert by_name(plan)["copy"].concepts == ("a free one",)


def test_an_image_that_is_nearer_to_what_the_request_avoids_is_refused_with_the_reason() -> None:
    rose, tulip = found("rose", 0.6), found("tulip", 0.6)
    avoided = Avoided({"a rose": 0.7 * rose.vector, "a cat": 0.1 * tulip.vector})
    refused = {each.image.id: reason for each in (rose, tulip) if (reason := avoided.reason(each))}
    plan = decided([ConceptImages("a flower", [rose, tulip], refused=refused)])
    assert chosen(plan) == ["tulip"]
    assert "“a rose”, which the request avoids" in by_name(plan)["rose"].reason


names = st.sampled_from([f"image {number}" for number in range(12)])
similarities = st.floats(-1, 1, allow_nan=False, width=32)
searched = st.lists(
    st.tuples(st.dictionaries(names, similarities, max_size=12), st.none() | st.integers(1, 4)), min_size=1, max_size=5
)


@given(searched, st.integers(1, 6), st.floats(-1, 1), st.none() | st.floats(0, 2))
def test_every_plan_keeps_its_limits(
    searched: list[tuple[dict[str, float], int | None]], most: int, limit: float, max_gap: float | None
) -> None:
    concepts = [concept(f"concept {number}", images, k=k) for number, (images, k) in enumerate(searched)]
    plan = decided(concepts, most=most, gate=Gate(limit, max_gap))
    used = plan.used.candidates
    assert len(used) <= most
    ids = [each.scored.image.id for each in plan.candidates]
    assert len(set(ids)) == len(ids)
    assert sum(each.weight for each in plan.candidates) == pytest.approx(1 if used else 0)
    assert all(each.weight > 0 and each.concepts for each in used)
    assert all(each.weight == 0 for each in plan.candidates if not each.used)
    for each, asked in zip(plan.concepts, concepts, strict=True):
        passing = [one for one in asked.images if one.similarity >= limit]
        assert each.found == bool(passing)
        assert len(each.image_ids) <= (most if asked.k is None else asked.k)
        assert (each.reason is None) == bool(each.image_ids)
        assert set(each.image_ids) == {one.scored.image.id for one in used if each.text in one.concepts}
    # No concept has two references while another that was found has none.
    if any(each.found and not each.image_ids for each in plan.concepts):
        assert len(used) == most
        assert all(len(each.image_ids) <= most for each in plan.concepts)
        covered = {text for each in used for text in each.concepts}
        assert len(covered) >= len(used)
    assert plan == decided(concepts, most=most, gate=Gate(limit, max_gap)), "a plan is repeatable"


@given(st.dictionaries(names, similarities, max_size=12), st.integers(1, 6), st.floats(-1, 1))
def test_one_concept_is_the_nearest_images_that_pass(images: dict[str, float], most: int, limit: float) -> None:
    asked = concept("any", images)
    plan = decided([asked], most=most, gate=Gate(limit))
    nearest = [str(each.image.caption) for each in asked.images][:most]
    passing = [name for name in nearest if images[name] >= limit]
    assert chosen(plan) == passing
    assert [str(each.scored.image.caption) for each in plan.candidates] == nearest
