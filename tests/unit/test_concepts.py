"""The rules that split a prompt into concepts."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.concepts import (
    MAX_CONCEPTS,
    MAX_HEADS,
    counts_several,
    heads,
    searched_texts,
    singular,
    split_prompt,
    wordings,
)


@pytest.mark.parametrize(
    ("prompt", "concepts"),
    [
        ("a robot holding a flower", ["a robot", "a flower"]),
        ("a cat wearing a hat", ["a cat", "a hat"]),
        ("a pig wearing sunglasses", ["a pig", "sunglasses"]),
        ("a dog and a red car", ["a dog", "a red car"]),
        ("hamburger and french fries", ["hamburger", "french fries"]),
        ("a lemon, a pineapple", ["a lemon", "a pineapple"]),
        ("a mouse next to some cheese", ["a mouse", "some cheese"]),
        ("a fox under a tree", ["a fox", "a tree"]),
        ("an owl in front of the castle", ["an owl", "the castle"]),
        ("a basket full of apples", ["a basket", "apples"]),
        ("a rocket flying past a ringed planet", ["a rocket", "a ringed planet"]),
        ("a robot that holds a flower", ["a robot", "a flower"]),
        ("a man who is wearing a hat", ["a man", "a hat"]),
        ("a cat\nwearing a hat", ["a cat", "a hat"]),
        ("two cats and three dogs", ["two cats", "three dogs"]),
        ("a lighthouse at night", ["a lighthouse", "night"]),
        ("fish under water", ["fish", "water"]),
    ],
)
def test_things_become_concepts_in_the_words_of_the_prompt(prompt: str, concepts: list[str]) -> None:
    assert split_prompt(prompt) == concepts


@pytest.mark.parametrize(
    "prompt",
    [
        "two dogs",
        "a winter landscape",
        "a smiling sun",
        "a wedding ring",
        "a flying saucer",
        "a slice of pizza",
        "a red apple with a bite",
        "a red apple with a bite and a leaf",
        "a birthday cake with candles",
        "a slice of pizza with olives",
        "a girl with long hair and blue eyes",
        "a black and white cat",
        "a big, red car",
        "bow and arrow",
        "house with garden",
        "face with tears of joy",
        "tool for cutting",
        "ein Hund und eine Katze",
        "un chat avec un chapeau",
        "猫が帽子をかぶっている",
        "qwertyuiop",
    ],
)
def test_one_thing_stays_whole(prompt: str) -> None:
    assert split_prompt(prompt) == [prompt]


@pytest.mark.parametrize(
    ("prompt", "concepts"),
    [
        ("a drawing of a whale", ["a whale"]),
        ("Oil painting of two dogs playing in the park, 4k, highly detailed", ["two dogs", "the park"]),
        ("a toolbox, cinematic lighting, by Greg Rutkowski, in the style of Monet", ["a toolbox"]),
        ("(masterpiece:1.2), a red hat, best quality", ["a red hat"]),
        ("an astronaut in the background", ["an astronaut"]),
    ],
)
def test_style_is_no_concept(prompt: str, concepts: list[str]) -> None:
    assert split_prompt(prompt) == concepts


@pytest.mark.parametrize(
    ("prompt", "concepts"),
    [
        ("no people, a beach without umbrellas", ["a beach"]),
        ("a cat without a hat, a dog", ["a cat", "a dog"]),
        ("a rocket taking off", ["a rocket"]),
        ("a cat looking at itself", ["a cat"]),
    ],
)
def test_what_is_excluded_or_no_thing_is_left_out(prompt: str, concepts: list[str]) -> None:
    assert split_prompt(prompt) == concepts


def test_a_list_ends_at_the_limit_and_repeats_nothing() -> None:
    animals = ["a cat", "a dog", "a mouse", "a bird", "a fish", "a cow", "a pig", "a horse", "a sheep"]
    assert split_prompt(", ".join(["A cat", *animals])) == ["a cat", *animals[1:MAX_CONCEPTS]]


@pytest.mark.parametrize("prompt", ["", " ", ",,,,", "...", "😀😀", "the", "with of", "4k, masterpiece", "\x00"])
def test_a_prompt_without_a_thing_comes_back(prompt: str) -> None:
    assert split_prompt(prompt) == [prompt]


VOCABULARY = ["a", "the", "two", "red", "cat", "dogs", "robot", "wearing", "holding", "with", "and", ",", "."]
words = st.sampled_from([*VOCABULARY, "of", "no", "under", "next", "to", "in", "4k", "😀", "is"])


@given(st.one_of(st.text(max_size=200), st.lists(words, max_size=60).map(" ".join)))
def test_any_prompt_has_a_bounded_number_of_concepts_that_it_contains(prompt: str) -> None:
    concepts = split_prompt(prompt)
    assert 1 <= len(concepts) <= MAX_CONCEPTS
    assert all(concept in prompt for concept in concepts)
    assert concepts == [prompt] or all(concept.strip() == concept != "" for concept in concepts)
    assert len({concept.casefold() for concept in concepts}) == len(concepts)
    for concept in concepts:
        assert wordings(concept)[0] == concept
        assert len(heads(concept)) <= MAX_HEADS
        assert concept not in heads(concept)
        assert searched_texts(concept)[:1] == [concept]
        assert set(searched_texts(concept)) == {*wordings(concept), *heads(concept)}


@pytest.mark.parametrize("piece", ["a ", ",", "and ", "a cat with ", "ing ", "(", "a red and ", "😀", "x", "no "])
def test_hostile_prompts_take_no_time(piece: str) -> None:
    started = time.process_time()
    split_prompt((piece * 2000)[:2000])
    singular((piece * 2000)[:2000])
    heads((piece * 2000)[:2000])
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("two dogs", "dog"),
        ("some mushrooms", "mushroom"),
        ("a pair of shoes", "shoe"),
        ("a pair of scissors", "scissors"),
        ("butterflies", "butterfly"),
        ("mice", "mouse"),
        ("two men", "man"),
        ("snowmen", "snowman"),
        ("cookies", "cookie"),
        ("zombies", "zombie"),
        ("fairies", "fairy"),
        ("ties", "tie"),
        ("buses", "bus"),
        ("houses", "house"),
        ("horses", "horse"),
        ("dresses", "dress"),
        ("octopuses", "octopus"),
        ("heroes", "hero"),
        ("shoes", "shoe"),
        ("toes", "toe"),
        ("peaches", "peach"),
        ("moustaches", "moustache"),
        ("shelves", "shelf"),
        ("gloves", "glove"),
        ("waves", "wave"),
        ("axes", "axe"),
        ("foxes", "fox"),
        ("taxis", "taxi"),
        ("three old books on a table", "old book on a table"),
        ("red roses", "red rose"),
        ("4 boxes", "box"),
        ("one apple", "apple"),
        ("some cheese", "cheese"),
    ],
)
def test_plurals_have_a_second_wording(text: str, one: str) -> None:
    assert singular(text) == one
    assert wordings(text) == [text, one]


@pytest.mark.parametrize("text", ["two dogs", "4 boxes", "a few red apples", "a group of people in a park"])
def test_a_concept_counts_several_things(text: str) -> None:
    assert counts_several(text)


@pytest.mark.parametrize("text", ["a dog", "one dog", "dogs", "the dogs", "a pair of jeans", "mountains at sunset", ""])
def test_a_concept_counts_at_most_one_thing(text: str) -> None:
    assert not counts_several(text)


@pytest.mark.parametrize(
    "text",
    ["a dog", "the cactus", "a glass of milk", "chess", "glasses", "a canvas", "news", "tennis", "12345 678", "", "猫"],
)
def test_other_texts_have_one_wording(text: str) -> None:
    assert wordings(text) == [text]


@pytest.mark.parametrize(
    ("concept", "names"),
    [
        ("draw me a tractor", ["tractor"]),
        ("a big juicy hamburger", ["juicy hamburger", "hamburger"]),
        ("an angry face", ["angry face", "face"]),
        ("a pile of books", ["book"]),
        ("a flock of geese", ["goose"]),
        ("a red apple with a bite", ["red apple", "apple"]),
        ("a girl with long hair and blue eyes", ["girl"]),
        ("a black and white cat", ["white cat", "cat"]),
        ("off its feathers", ["feather"]),
        ("geese", ["goose"]),
    ],
)
def test_the_last_words_of_a_concept_name_it(concept: str, names: list[str]) -> None:
    assert heads(concept) == names


@pytest.mark.parametrize(
    "concept",
    [
        "hamburger",
        "a robot holding a flower",
        "un chat avec un chapeau noir",
        "猫が帽子をかぶっている",
        "the of",
        "...",
        "",
    ],
)
def test_a_name_several_things_and_other_languages_have_no_shorter_name(concept: str) -> None:
    assert heads(concept) == []
