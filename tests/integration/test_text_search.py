"""Search by the words of captions and tags, alone and together with the search by vectors."""

import base64
import json
import math
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image as Picture
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from scripts.admin import __main__ as admin
from shared import retrieval
from shared.contracts.search import ImageFilter, SearchMode
from shared.db import spaces, text_search
from shared.db.images import Vector
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import Collection, Image
from shared.db.text_search import Match
from shared.errors import ConfigurationError
from shared.retrieval.candidates import fuse
from shared.settings import STARTER, ModelSettings, RetrievalSettings, Settings
from tests.factories import DIM, SHARED_COLLECTION, make_image, make_space
from tests.integration.conftest import API, Client, picture
from tests.integration.test_api_search import embed_worker, found, search, towards
from worker_service.models.clip import Clip

ANYWHERE = towards(a0=1)
"""A vector for images whose similarity does not matter."""
HOSTILE = [
    "' | 'a'",
    "a & !b <-> (c",
    "cat:* | dog:ABCD",
    "\\' \\\\ \\",
    "''; drop table images; --",
    "%s %(x)s {0} $1 :name ::text",
    "<script>alert(1)</script> https://a.example/b?c=d#e x@y.example /etc/passwd C:\\dir",
    "the of and a",
    "!!! ??? ...",
    "\u202e\u0301\u0301 \U0001f415 狗 собака كلب",
    "word" * 500,
    'a\'b\\c "d" ' * 150,
    " ".join(f"word{number}" for number in range(300)),
]


KNOWN = math.log1p(200 / 2) / (math.log1p(200 / 2) + math.log1p(200))
"""The weight of a word of two images, compared with that word and a word of no image."""
SHARES_OF_A_VECTOR_HIT: list[tuple[str | None, list[str], float]] = [
    ("a city", [], -KNOWN / 2),
    (None, ["city"], 0),
    (None, [], 0),
]
"""Caption, tags and expected `word_share` of an image without a word of the query: a caption describes the image."""


@pytest.fixture
def space(session: Session) -> Space:
    space = make_space(session)
    session.commit()
    return space


def add(session: Session, caption: str | None, *tags: str, vector: Vector = ANYWHERE, **columns: Any) -> UUID:
    return make_image(session, vector=vector, caption=caption, tags=list(tags), **columns).id


def matching(
    session: Session, space: Space, content: str, *, k: int = 100, where: ImageFilter | None = None, **options: Any
) -> list[UUID]:
    """The ids of the images that match, best first, without a vector."""
    matches = text_search.matching_images(
        session,
        space,
        content,
        None,
        k=k,
        **{"collection_id": SHARED_COLLECTION, "where": where or ImageFilter(), **options},
    )
    return [match.image_id for match in matches.found]


# --- words --------------------------------------------------------------------------------------------------------


def test_other_forms_of_a_word_are_found(session: Session, space: Space) -> None:
    dog, running = add(session, "A dog."), add(session, "DOGS, running!")
    puppy = add(session, "a poodle", "puppy", "dog")
    add(session, "a dogma")
    for query in ("dogs", "Dog", "the dog's"):
        assert set(matching(session, space, query)) == {dog, running, puppy}, query
    assert matching(session, space, "puppies") == [puppy]
    assert matching(session, space, "ran") == [], "only the end of a word is stemmed"
    assert matching(session, space, "runs") == [running]


def test_a_word_of_the_caption_ranks_before_one_of_the_tags(session: Session, space: Space) -> None:
    tagged = add(session, "a bone", "dog")
    further = add(session, "a dog at the sea", "animal")
    named = add(session, "dog", "pet", "animal", "friend")
    assert matching(session, space, "two dogs") == [named, further, tagged]


def test_counting_words_and_media_are_ignored_beside_others(session: Session, space: Space) -> None:
    dog, hearts = add(session, "a dog"), add(session, "two hearts")
    photo = add(session, "a photo of a lake")
    assert matching(session, space, "two dogs") == [dog]
    assert matching(session, space, "a photo of 2 dogs") == [dog]
    assert matching(session, space, "two") == [hearts], "alone they are the question"
    assert matching(session, space, "photo") == [photo]
    assert matching(session, space, "the of a") == []


def test_a_kind_of_picture_is_ignored_beside_other_words(session: Session, space: Space) -> None:
    city, snowman = add(session, "a city", "landscape"), add(session, "a snowman", "winter")
    assert matching(session, space, "a winter landscape") == [snowman]
    assert matching(session, space, "a landscape") == [city], "alone it is the question"


def test_a_rare_word_weighs_more_than_a_common_one(session: Session, space: Space) -> None:
    reds = [add(session, f"a red {thing}") for thing in ("car", "door", "book", "hat", "shoe", "cup")]
    apple = add(session, "an apple")
    assert matching(session, space, "a red apple")[0] == apple
    assert set(matching(session, space, "a red apple", alone=True)) == {apple, *reds}
    both = add(session, "an apple of a bright red")
    assert matching(session, space, "a red apple")[:2] == [both, apple]
    assert set(matching(session, space, "a red apple")).isdisjoint(reds), "less than half of the best score"


def test_two_words_in_the_tags_outrank_one_in_the_caption(session: Session, space: Space) -> None:
    vehicle, _ = add(session, "a vehicle", "blue", "car"), add(session, "a car")
    add(session, "a blue book")
    assert matching(session, space, "blue car")[0] == vehicle


def test_paths_hosts_and_addresses_are_words(session: Session, space: Space) -> None:
    image = add(session, "a cat/dog.A bird@home", "paris-france")
    for query in ("cat", "dogs", "birds", "home", "paris", "cat/dog"):
        assert matching(session, space, query) == [image], query


@pytest.mark.parametrize("query", HOSTILE)
def test_a_hostile_query_never_raises(session: Session, space: Space, query: str) -> None:
    image = add(session, query)
    assert matching(session, space, query) in ([image], []), query
    assert matching(session, space, "dog", without=[query]) == []


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40), max_size=3))
def test_an_image_is_found_by_its_own_words(session: Session, space: Space, words: list[str]) -> None:
    caption = " ".join(words)
    image = add(session, caption)
    has_words = session.scalar(select(Image.words != "").where(Image.id == image))
    assert (image in matching(session, space, caption, k=1000)) == has_words
    assert image not in matching(session, space, caption, k=1000, without=[caption])
    session.rollback()


def test_only_searchable_images_of_the_collection_that_pass_the_filter_match(session: Session, space: Space) -> None:
    other = Collection(id=uuid4(), owner_id=session.scalar(select(Collection.owner_id)), name="other")
    session.add(other)
    session.flush()
    here, elsewhere = add(session, "a dog", "pet"), add(session, "a dog", collection_id=other.id)
    add(session, "a dog", licence="MIT")
    make_image(session, caption="a dog", tags=["pet"])  # pending
    assert matching(session, space, "dogs", where=ImageFilter(tags=["pet"])) == [here]
    assert matching(session, space, "dogs", collection_id=other.id) == [elsewhere]
    assert len(matching(session, space, "dogs")) == 2
    assert len(matching(session, space, "dogs", k=1)) == 1


def test_a_changed_description_is_found_by_its_new_words(client: Client, session: Session, space: Space) -> None:
    image = add(session, "a dog", "pet")
    session.commit()
    assert client.patch(f"{API}/images/{image}", json={"caption": "a lion"}).status_code == 200
    assert matching(session, space, "dog") == []
    assert matching(session, space, "lion") == matching(session, space, "pet") == [image]
    assert client.patch(f"{API}/images/{image}", json={"tags": [], "caption": None}).status_code == 200
    assert matching(session, space, "lion") == matching(session, space, "pet") == []


def test_a_sample_counts_as_a_count_of_each_word_does(session: Session, space: Space) -> None:
    words = ["red", "big", "old", "wet", "dog", "cat"]
    random = np.random.default_rng(5)
    shares = [0.9, 0.6, 0.5, 0.2, 0.05, 0.0]
    having: dict[str, int] = dict.fromkeys(words, 0)
    for _ in range(60):
        chosen = [word for word, share in zip(words, shares, strict=True) if random.random() < share]
        add(session, " ".join(chosen) or None)
        having = {word: count + (word in chosen) for word, count in having.items()}
    searchable = text_search._searchable([])
    for most in (1, 5, 20, 100):
        for number in range(1, len(words) + 1):
            counted = text_search._count_images(session, words[:number], searchable, most=most)
            assert counted == {word: min(having[word], most + 1) for word in words[:number]}, most


def test_very_common_words_do_not_select_images(
    session: Session, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_search, "COMMON_ABOVE_ALONE", 5)
    reds = {add(session, f"a red {number}") for number in range(20)}
    apple = add(session, "a red apple")

    def matches(content: str) -> text_search.Matches:
        return text_search.matching_images(
            session,
            space,
            content,
            None,
            k=100,
            collection_id=SHARED_COLLECTION,
            where=ImageFilter(),
            alone=True,
        )

    assert matches("red apples").found[0].image_id == apple
    assert matches("apples").exact
    some = matches("red")
    assert len(some.found) == 5
    assert not some.exact
    assert {each.image_id for each in some.found} <= reds | {apple}


# --- names --------------------------------------------------------------------------------------------------------


def known(session: Session, *names: str, where: ImageFilter | None = None) -> str | None:
    return text_search.find_name(session, names, collection_id=SHARED_COLLECTION, where=where or ImageFilter())


@pytest.mark.parametrize(
    "caption", ["machine", "The machines!", "two boys, a machine and a door", "They stand by it: the machine is on."]
)
def test_a_caption_has_a_name_by_itself(session: Session, space: Space, caption: str) -> None:
    add(session, caption)
    assert known(session, "machine") == "machine"


@pytest.mark.parametrize("caption", ["slot machine", "the washing machine", "a machine gun", "apparatus", None])
def test_a_name_that_is_a_part_of_another_one_is_not_known(session: Session, space: Space, caption: str | None) -> None:
    add(session, caption, "machine", "washing")
    assert known(session, "machine") is None


def test_the_first_known_name_is_found(session: Session, space: Space) -> None:
    add(session, "bear")
    assert known(session, "teddy bear", "bear") == "bear"
    add(session, "a bear with a teddy")
    assert known(session, "teddy bear", "bear") == "bear", "the words in another order"
    add(session, "two Teddy-bears", licence="MIT")
    assert known(session, "teddy bears", "bear") == "bear"
    teddy = add(session, "the teddy bear", "toy")
    assert known(session, "teddy bears", "bear") == "teddy bears"
    assert known(session, "teddy bear", where=ImageFilter(tags=["toy"])) == "teddy bear"
    assert known(session, "teddy bear", where=ImageFilter(tags=["pet"])) is None
    session.get_one(Image, teddy).state = "pending"
    session.flush()
    assert known(session, "teddy bear") is None, "it is not searchable"
    assert known(session) is None


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_never_raises(session: Session, space: Space, name: str) -> None:
    add(session, name)
    assert known(session, name) in (name, None)


# --- the language -------------------------------------------------------------------------------------------------


def test_the_language_is_changed_by_a_command(
    settings: Settings,
    client: Client,
    session: Session,
    space: Space,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(text_search, "PAGE", 2)
    houses = {add(session, "Häuser am See"), *(add(session, f"ein Haus {number}") for number in range(4))}
    session.commit()
    query = {"query": "Häusern", "mode": "text"}
    assert found(search(client, **query)) == []
    monkeypatch.setattr("sys.argv", ["admin", "set-text-language", "german"])
    admin.main()
    assert "german" in capsys.readouterr().out
    assert text_search.read_language(session) == "german"
    assert set(found(search(client, **query))) == houses, "the cached answer is not used"
    later = add(session, "das Haus")
    assert later in matching(session, space, "Häuser"), "the trigger uses the new language"


def test_an_unknown_language_is_refused(
    settings: Settings, session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError, match="no text search configuration 'klingon'"):
        text_search.set_language(session, "klingon")
    monkeypatch.setattr("sys.argv", ["admin", "set-text-language", "klingon"])
    with pytest.raises(SystemExit):
        admin.main()
    assert capsys.readouterr().err.count("\n") == 1
    session.rollback()
    assert text_search.read_language(session) == "english"


# --- both searches ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), unique=True), st.lists(st.integers(0, 30), unique=True))
def test_fused_lists_are_ordered_by_reciprocal_rank(by_vector: list[int], by_text: list[int]) -> None:
    matches = [
        Match(UUID(int=number), rank, similarity=0, word_share=1) for rank, number in enumerate(by_text, start=1)
    ]
    fused = [each.int for each in fuse([UUID(int=number) for number in by_vector], matches)]
    assert sorted(fused) == sorted({*by_vector, *by_text})

    def score(number: int) -> float:
        return sum(1 / (61 + ranks.index(number)) for ranks in (by_vector, by_text) if number in ranks)

    assert [score(number) for number in fused] == sorted(map(score, fused), reverse=True)
    assert [number for number in fused if number not in by_text] == [n for n in by_vector if n not in by_text]
    first = fused[:1]
    assert not (by_vector and by_text) or first == by_vector[:1] or score(first[0]) > 1 / 61


VECTORS = st.lists(st.floats(-1, 1, width=16), min_size=DIM, max_size=DIM).filter(lambda v: np.linalg.norm(v) > 0.1)
WORDS = st.lists(st.sampled_from(["dog", "dogs", "cat", "red", "two", "a"]), max_size=4).map(" ".join)


@pytest.mark.parametrize(("caption", "tags", "share"), SHARES_OF_A_VECTOR_HIT)
def test_other_words_than_those_of_the_query_count_against_an_image(
    session: Session, space: Space, caption: str | None, tags: list[str], share: float
) -> None:
    """The image is the nearest one. Other images have one of the two words."""
    image = add(session, caption, *tags)
    for _ in range(2):
        add(session, "a robot", vector=towards(a0=-1))
    answer = retrieval.find_candidates(
        session,
        space,
        text="a robot zeppelin",
        vector=ANYWHERE,
        k=3,
        mode=SearchMode.HYBRID,
        collection_id=SHARED_COLLECTION,
        where=ImageFilter(),
        settings=RetrievalSettings(),
    ).images
    (found,) = [each for each in answer if each.image.id == image]
    assert found.word_share == pytest.approx(share, abs=0.005)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(WORDS, VECTORS), min_size=1, max_size=12),
    WORDS,
    VECTORS,
    st.integers(1, 15),
    st.none() | st.floats(-1, 1),
)
def test_a_hybrid_search_returns_k_different_images_with_their_true_similarity(
    session: Session,
    space: Space,
    corpus: list[tuple[str, list[float]]],
    words: str,
    query: list[float],
    k: int,
    threshold: float | None,
) -> None:
    unit = (np.array(query) / np.linalg.norm(query)).astype(np.float32)
    for caption, vector in corpus:
        add(session, caption, vector=np.array(vector, np.float32))
    answer = retrieval.find_candidates(
        session,
        space,
        text=words,
        vector=unit,
        k=k,
        mode=SearchMode.HYBRID,
        collection_id=SHARED_COLLECTION,
        where=ImageFilter(),
        settings=RetrievalSettings(),
        threshold=threshold,
    ).images
    similarities = [float(np.dot(unit, vector) / np.linalg.norm(vector)) for _, vector in corpus]
    assert len({each.image.id for each in answer}) == len(answer)
    for each in answer:
        assert each.similarity == pytest.approx(float(unit @ each.vector), abs=2e-3)
        assert threshold is None or each.similarity >= threshold
    at_least = sum(threshold is None or each > threshold + 2e-3 for each in similarities)
    assert min(k, at_least) <= len(answer) <= k
    session.rollback()


def test_a_query_in_words_is_hybrid_and_says_what_found_each_image(
    client: Client, session: Session, space: Space
) -> None:
    both = add(session, "a dog", vector=towards(a0=1, a1=1))
    near = add(session, "a wolf", vector=towards(a0=1, a1=0.5))
    named = add(session, "the dog", vector=towards(a2=1))
    session.commit()
    with embed_worker(space, lambda items: np.stack([towards(a0=2) for _ in items])):
        answer = search(client, query="dogs", k=5)
        assert found(answer) == [both, named, near]
        results = answer.json["results"]
        assert [result["found_by"] for result in results] == [["vector", "text"], ["vector", "text"], ["vector"]]
        assert [result["similarity"] for result in results] == pytest.approx([0.707, 0, 0.894], abs=2e-3)
        assert answer.json["mode"] == "hybrid"
        by_vector = search(client, query="dogs", k=5, mode="vector")
    assert found(by_vector) == [near, both, named]
    assert {tuple(result["found_by"]) for result in by_vector.json["results"]} == {("vector",)}


def test_an_image_that_only_its_words_find_has_its_true_similarity(
    client: Client, session: Session, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.retrieval.candidates.FUSED_DEPTH", 2)
    for number in range(4):
        add(session, f"wolf {number}", vector=towards(a0=1, a1=number / 10))
    dog = add(session, "dog", vector=towards(a0=-1, a1=0.5))
    session.commit()
    with embed_worker(space, lambda items: np.stack([towards(a0=2) for _ in items])):
        answer = search(client, query="dogs", k=2)
        assert dog in found(answer)
        [result] = [each for each in answer.json["results"] if each["image_id"] == str(dog)]
        assert (result["found_by"], result["similarity"]) == (["text"], pytest.approx(-2 / math.sqrt(5), abs=2e-3))
        above = search(client, query="dogs", k=2, threshold=0.5)
    assert dog not in found(above)
    assert len(found(above)) == 2, "images below the threshold take no place"


def test_the_mode_text_needs_no_worker(client: Client, session: Session, space: Space) -> None:
    named, tagged = add(session, "a dog"), add(session, "a poodle", "dog")
    add(session, "a cat")
    session.commit()
    answer = search(client, query="dogs", mode="text")
    assert found(answer) == [named, tagged]
    assert [result["similarity"] for result in answer.json["results"]] == [None, None]
    assert (answer.json["mode"], answer.json["exact"], answer.json["shortfall"]) == ("text", True, 8)
    unwanted = [{"text": "a poodle"}]
    assert found(search(client, query="dogs", mode="text", negative=unwanted)) == [named]
    assert found(search(client, mix=[{"text": "cats"}, {"text": "poodles"}], mode="text", k=1)) != []


@pytest.mark.parametrize(
    "body",
    [
        {"query": "dog", "mode": "text", "threshold": 0.5},
        {"query": "dog", "mode": "text", "diversity": 0.5},
        {"query": "dog", "mode": "text", "image_id": str(uuid4())},
        {"query": "dog", "mode": "text", "negative": [{"image_id": str(uuid4())}]},
        {"image_id": str(uuid4()), "mode": "text"},
        {"image_id": str(uuid4()), "mode": "hybrid"},
        {"query": "dog", "mode": "fuzzy"},
        {"negative": [{"text": "dog"}]},
        {"mix": []},
        {"mix": [{"text": "a", "image_id": str(uuid4())}]},
        {"mix": [{"weight": 1}]},
        {"mix": [{"text": "a", "weight": 0}]},
        {"mix": [{"text": "a", "weight": 10.5}]},
        {"mix": [{"text": "a", "weight": "NaN"}]},
        {"mix": [{"text": ""}]},
        {"mix": [{"text": "a"}] * 9},
        {"query": "a", "negative": [{"text": "a"}] * 9},
    ],
)
def test_requests_that_make_no_sense_are_refused(client: Client, body: dict[str, Any]) -> None:
    answer = search(client, **body)
    assert (answer.status_code, answer.json["code"]) == (422, "validation_failed")
    assert answer.json["errors"][0]["field"].startswith("body")


# --- mixes and negatives ------------------------------------------------------------------------------------------

AXES = {"red": towards(a0=1), "green": towards(a1=1), "blue": towards(a2=1), "reddish": towards(a0=1, a1=0.001)}


def by_name(items: Sequence[Any]) -> Vector:
    """Embed colours on axes of their own, and pictures on the axis of blue."""
    return np.stack([AXES["blue"] if isinstance(item, Picture.Image) else AXES[item] for item in items])


@pytest.fixture
def axes(session: Session, space: Space) -> Iterator[list[UUID]]:
    """Images on the axes red, green and blue, while a worker embeds these words."""
    ids = [add(session, f"image {name}", vector=AXES[name]) for name in ("red", "green", "blue")]
    session.commit()
    with embed_worker(space, by_name):
        yield ids


def similarities(answer: Any) -> dict[UUID, float]:
    assert answer.status_code == 200, answer.text
    return {UUID(each["image_id"]): each["similarity"] for each in answer.json["results"]}


def test_texts_and_images_are_mixed_by_weight(client: Client, axes: list[UUID]) -> None:
    blue = base64.b64encode(picture("blue")).decode()
    mix = [{"text": "green", "weight": 2}, {"image": blue, "weight": 2}]
    answer = search(client, query="red", mix=mix, mode="vector")
    assert similarities(answer) == pytest.approx(dict(zip(axes, [1 / 3, 2 / 3, 2 / 3], strict=True)), abs=2e-3)
    by_id = [{"text": "green", "weight": 2}, {"image_id": str(axes[2]), "weight": 2}]
    assert similarities(search(client, query="red", mix=by_id, mode="vector")) == pytest.approx(
        similarities(answer), abs=2e-3
    )
    as_form = {"query": "red", "mix": json.dumps(by_id), "mode": "vector", "k": "10"}
    form = client.post(f"{API}/search", data=as_form, content_type="multipart/form-data")
    assert similarities(form) == pytest.approx(similarities(answer), abs=2e-3)
    alone = search(client, mix=[{"text": "green", "weight": 0.1}])
    assert found(alone)[0] == axes[1]
    assert alone.json["results"][0]["similarity"] == pytest.approx(1, abs=2e-3)


def test_negatives_move_the_query_away(client: Client, axes: list[UUID]) -> None:
    answer = search(client, query="red", negative=[{"text": "green"}, {"image_id": str(axes[2]), "weight": 2}])
    expected = np.array([1, -0.5, -1]) / 1.5
    assert similarities(answer) == pytest.approx(dict(zip(axes, expected, strict=True)), abs=2e-3)
    assert found(answer)[0] == axes[0]


def test_words_do_not_find_what_a_negative_text_names(client: Client, session: Session, space: Space) -> None:
    red = add(session, "a red apple", vector=towards(a0=1))
    green = add(session, "a green apple", vector=towards(a1=1))
    session.commit()
    vectors = {"apple": towards(a0=1, a1=1), "reds": towards(a0=1)}
    with embed_worker(space, lambda items: np.stack([vectors[item] for item in items])):
        answer = search(client, query="apple", negative=[{"text": "reds"}])
    assert found(answer) == [green, red]
    assert [each["found_by"] for each in answer.json["results"]] == [["vector", "text"], ["vector"]]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"query": "red", "negative": [{"text": "red"}]}, "body.negative"),
        ({"query": "red", "negative": [{"text": "red", "weight": 2}]}, "body.negative"),
        ({"query": "red", "negative": [{"text": "reddish", "weight": 10}]}, "body.negative"),
        (
            {"mix": [{"text": "red"}, {"text": "green"}], "negative": [{"text": "red"}, {"text": "green"}]},
            "body.negative",
        ),
    ],
)
def test_a_query_minus_itself_is_refused(client: Client, axes: list[UUID], body: dict[str, Any], field: str) -> None:
    answer = search(client, **body)
    assert answer.status_code == 422, answer.text
    assert [(each["field"], each["code"]) for each in answer.json["errors"]] == [(field, "contradiction")]


def test_a_wrong_picture_or_a_foreign_image_in_a_mix_is_named(client: Client, axes: list[UUID]) -> None:
    answer = search(client, query="red", mix=[{"text": "green"}, {"image": "not base64!"}])
    assert answer.status_code == 422
    assert answer.json["errors"][0]["field"] == "body.mix.1.image"
    assert search(client, query="red", negative=[{"image_id": str(uuid4())}]).status_code == 404


def test_answers_of_different_modes_are_cached_apart(client: Client, axes: list[UUID]) -> None:
    modes = ["hybrid", "vector", "text"]
    answers = {mode: search(client, query="red", mode=mode).json for mode in modes}
    again = {mode: search(client, query="red", mode=mode).json for mode in modes}
    assert answers == again
    assert [answers[mode]["mode"] for mode in modes] == modes


@given(
    st.lists(st.tuples(VECTORS, st.floats(0.01, 10)), min_size=1, max_size=8),
    st.lists(st.tuples(VECTORS, st.floats(0.01, 10)), max_size=8),
)
def test_a_combined_vector_has_length_one_or_is_refused(
    wanted: list[tuple[list[float], float]], unwanted: list[tuple[list[float], float]]
) -> None:
    def normalised(parts: list[tuple[list[float], float]]) -> list[tuple[Vector, float]]:
        return [((np.array(v) / np.linalg.norm(v)).astype(np.float32), weight) for v, weight in parts]

    combined = retrieval.combine(normalised(wanted), normalised(unwanted))
    if combined is not None:
        assert combined.dtype == np.float32
        assert np.linalg.norm(combined) == pytest.approx(1, abs=1e-5)
    assert retrieval.combine(normalised(wanted), normalised(wanted)) is None


# --- the starter corpus -------------------------------------------------------------------------------------------

SUBJECTS = ["dog", "bone", "two hearts", "cut of meat", "hot dog", "cat", "red apple", "red heart", "toolbox", "robot"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip.load(ModelSettings())


@pytest.fixture
def starter(session: Session, clip: Clip) -> Space:
    """The images of `SUBJECTS` of the starter corpus, with their captions, tags and vectors."""
    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    with tarfile.open(STARTER / "corpus.tar.gz") as corpus:
        files = {member.name: member for member in corpus}

        def read(name: str) -> Any:
            file = corpus.extractfile(files[name])
            assert file is not None
            return file

        for name in sorted(files):
            described = json.load(read(name)) if name.endswith(".json") else {}
            if described.get("caption") in SUBJECTS:
                vector = clip.encode_image([Picture.open(read(name.replace(".json", ".webp"))).convert("RGB")])[0]
                make_image(session, vector=vector, space=space, caption=described["caption"], tags=described["tags"])
    session.commit()
    return space


@pytest.mark.parametrize(
    ("query", "expected"), [("two dogs", "dog"), ("a photo of a dog", "dog"), ("red apples", "red apple")]
)
def test_words_find_what_the_vector_of_the_starter_clip_misses(
    session: Session, clip: Clip, starter: Space, query: str, expected: str
) -> None:
    vector = clip.encode_text([query])[0]
    vector /= np.linalg.norm(vector)

    def captions(mode: SearchMode) -> list[str | None]:
        found = retrieval.find_candidates(
            session,
            starter,
            text=query,
            vector=vector,
            k=10,
            mode=mode,
            collection_id=SHARED_COLLECTION,
            where=ImageFilter(),
            settings=RetrievalSettings(),
        )
        return [each.image.caption for each in found.images]

    assert captions(SearchMode.TEXT)[:3] == [expected] * 3
    assert expected in captions(SearchMode.HYBRID)
    if query == "two dogs":
        assert expected not in captions(SearchMode.VECTOR), "this CLIP does not know the plural"


def test_the_words_of_images_without_them_are_filled(settings: Settings, session: Session, space: Space) -> None:
    image = add(session, "a dog")
    session.execute(text("update images set words = null"))
    session.commit()
    assert matching(session, space, "dogs") == []
    with session_scope() as other:
        assert text_search.fill_words(other, after=UUID(int=0)) == image
        assert text_search.fill_words(other, after=image) is None
    assert matching(session, space, "dogs") == [image]


# --- shorter names of a concept -----------------------------------------------------------------------------------

TRACTOR = {
    "draw me a tractor": towards(a0=1),
    "tractor": towards(a1=1),
}


def planned(
    session: Session, space: Space, *, mode: SearchMode = SearchMode.HYBRID, gate: float = 0.5
) -> retrieval.Plan:
    query = retrieval.ConceptQuery.of(
        "draw me a tractor", TRACTOR, collection_id=SHARED_COLLECTION, where=ImageFilter()
    )
    return retrieval.plan_concepts(
        session, space, [query], most=3, gate=retrieval.Gate(gate), settings=RetrievalSettings(), mode=mode
    ).used


def captions(plan: retrieval.Plan) -> list[str | None]:
    return [each.scored.image.caption for each in plan.candidates]


def test_a_concept_that_the_corpus_lacks_is_searched_by_its_name(session: Session, space: Space) -> None:
    add(session, "pancakes", vector=towards(a0=1, a2=0.5))
    assert captions(planned(session, space)) == ["pancakes"]
    add(session, "tractor", vector=towards(a1=1, a2=0.5))
    plan = planned(session, space)
    assert captions(plan) == ["tractor"]
    (reference,), (concept,) = plan.candidates, plan.concepts
    assert reference.reason.endswith("searched as “tractor”")
    assert reference.scored.similarity == pytest.approx(0.894, abs=2e-3), "to the name, for the gate"
    assert reference.concepts == (concept.text,) == ("draw me a tractor",)


def test_captions_that_are_sentences_have_names_too(session: Session, space: Space) -> None:
    add(session, "pancakes", vector=towards(a0=1, a2=0.5))
    add(session, "An old man sits on the tractor and smiles.", vector=towards(a1=1, a2=0.5))
    add(session, "A red tractor stands in a field.", vector=towards(a1=1, a3=0.5))
    assert set(captions(planned(session, space))) == {
        "An old man sits on the tractor and smiles.",
        "A red tractor stands in a field.",
    }


def test_a_concept_keeps_its_own_images(session: Session, space: Space) -> None:
    """An image with all its words passes, its name's images do not pass, or the caller wants vectors alone."""
    add(session, "pancakes", vector=towards(a0=1, a2=0.5))
    named = add(session, "tractor", vector=towards(a1=1, a2=2))
    assert captions(planned(session, space)) == ["pancakes"], "0.45 is below the gate"
    session.get_one(Image, named).caption = "draw a tractor"
    add(session, "tractor", vector=towards(a1=1, a3=0.5))
    assert captions(planned(session, space, mode=SearchMode.VECTOR)) == ["pancakes"]
    assert captions(planned(session, space)) == ["tractor"]
    add(session, "draw the tractor", vector=towards(a0=1, a3=1))
    assert set(captions(planned(session, space))) == {"pancakes", "draw the tractor"}
