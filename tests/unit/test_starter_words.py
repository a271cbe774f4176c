"""The words for the training of the starter's text tower: from WordNet, and by hand."""

import random
from pathlib import Path

import pytest

from starter.data.corpus import Sample, read_corpus
from starter.data.themes import THEMES
from starter.data.words import WordNet, Words, absent_words, senses_of, words_for
from starter.train.texts import phrase, plural, with_article
from starter.train.vocabulary import load_vocabulary

LICENCE = "  1 This software and database is being provided to you\n"
DATA = """\
00000010 03 n 01 entity 0 001 ~ 00000020 n 0000 | that which exists
00000020 05 n 02 animal 0 beast 0 003 @ 00000010 n 0000 ~ 00000030 n 0000 ~ 00000060 n 0000 | a living creature
00000030 05 n 02 dog 0 Canis_familiaris 0 003 @ 00000020 n 0000 ~ 00000040 n 0000 + 00000099 v 0101 | a pet; "it barks"
00000040 05 n 01 puppy 0 001 @ 00000030 n 0000 | a young dog
00000050 18 n 01 dog 0 001 @ 00000010 n 0000 | a dull person
00000060 05 n 01 aardvark 0 001 @ 00000020 n 0000 | an animal that eats ants
00000070 06 n 01 hot_dog 0 001 @ 00000010 n 0000 | a puppy and an aardvark
"""
INDEX = """\
aardvark n 1 1 @ 1 0 00000060
animal n 1 1 @ 1 0 00000020
beast n 1 1 @ 1 0 00000020
dog n 2 1 @ 2 1 00000050 00000030
puppy n 1 1 @ 1 0 00000040
"""
SENSES = """\
aardvark%1:05:00:: 00000060 1 0
animal%1:05:00:: 00000020 1 9
beast%1:05:00:: 00000020 1 1
dog%1:05:00:: 00000030 1 40
dog%1:18:00:: 00000050 2 2
dog%2:38:00:: 00000099 1 90
puppy%1:05:00:: 00000040 1 2
"""


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(read_corpus())


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    for name, content in {"data.noun": DATA, "index.noun": INDEX, "index.sense": SENSES}.items():
        (tmp_path / name).write_text((LICENCE if name != "index.sense" else "") + content, encoding="utf-8")
    return WordNet.load(tmp_path)


def test_a_thing_has_words_of_the_same_a_narrower_and_a_broader_meaning(
    wordnet: WordNet, samples: list[Sample]
) -> None:
    dogs = [sample for sample in samples if sample.concept in ("dog", "dog face")]
    senses = senses_of(dogs, wordnet)
    assert {name: synset.gloss for name, synset in senses.items()} == {"dog": "a pet", "dog face": "a pet"}
    assert words_for(senses, wordnet) == [
        Words("broader", ("animal", "beast"), ("dog", "dog face")),
        Words("narrower", ("puppy",), ("dog", "dog face")),
        Words("same", ("dog",), ("dog", "dog face"), "a pet"),
    ]


def test_only_things_without_a_drawing_are_absent(wordnet: WordNet, samples: list[Sample]) -> None:
    dogs = [sample for sample in samples if sample.concept == "dog"]
    found = absent_words(dogs, senses_of(dogs, wordnet), wordnet, files=frozenset({5, 6}), most=10)
    assert found == ["aardvark"], "a puppy is a dog, and a hot dog shares a word with a thing of the corpus"


def test_words_and_themes_name_things_of_the_corpus(samples: list[Sample]) -> None:
    things = {sample.concept for sample in samples} | {f"[{sample.attributes['subgroup']}]" for sample in samples}
    vocabulary = load_vocabulary()
    assert {thing for theme in THEMES for thing in theme.things} <= things
    assert {thing for each in vocabulary.words for thing in each.things} <= things
    assert {each.relation for each in vocabulary.words} == {"same", "narrower", "broader"}


def test_an_absent_word_is_no_word_for_a_thing() -> None:
    vocabulary = load_vocabulary()
    words = {word for each in vocabulary.words for word in each.words}
    assert "submarine" in vocabulary.absent
    assert words.isdisjoint(vocabulary.absent)
    assert words.isdisjoint(vocabulary.abstract)


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("dog", "dogs"),
        ("puppy", "puppies"),
        ("fox", "foxes"),
        ("old woman", "old women"),
        ("mouse", "mice"),
        ("glass of milk", "glasses of milk"),
        ("umbrella with rain drops", "umbrellas with rain drops"),
        ("sunglasses", "sunglasses"),
        ("bus", "buses"),
        ("monkey", "monkeys"),
    ],
)
def test_plurals(one: str, many: str) -> None:
    assert plural(one) == many


def test_articles() -> None:
    assert [with_article(noun) for noun in ("apple", "dog", "grapes", "bus")] == [
        "an apple",
        "a dog",
        "grapes",
        "a bus",
    ]


def test_a_phrase_keeps_the_noun() -> None:
    texts = {phrase("puppy", random.Random(seed)) for seed in range(200)}
    assert all("puppy" in text or "puppies" in text for text in texts)
    assert {"puppy", "two puppies"} <= texts
