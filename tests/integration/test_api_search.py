"""Searching over HTTP. The tests act as the embed worker: they take queries from the real queue and answer them."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from PIL import Image as Picture
from sqlalchemy import update
from sqlalchemy.orm import Session

from shared.contracts.service import Capabilities
from shared.db import workers
from shared.db.images import Vector
from shared.db.spaces import Space
from shared.db.tables import Image
from shared.errors import EmbeddingError
from shared.messaging import embedding_rpc, queue
from tests.factories import DIM, make_image, make_space
from tests.integration.conftest import API, Client, picture
from tests.integration.test_api_jobs import CAPABILITIES

Embed = Callable[[Sequence[Any]], Vector]


def towards(**axes: float) -> Vector:
    """A vector, not normalised, by its non-zero components: `towards(a0=1, a3=2)`. Shape (DIM,), float32."""
    vector = np.zeros(DIM, np.float32)
    for name, value in axes.items():
        vector[int(name[1:])] = value
    return vector


def by_colour(items: Sequence[Any]) -> Vector:
    """Embed texts and pictures as vectors of length 3 on the axis of their colour."""
    colours = ["red", "green", "blue"]

    def axis(item: Any) -> int:
        if isinstance(item, Picture.Image):
            return int(np.argmax(np.asarray(item.convert("RGB")).mean((0, 1))))
        return next(i for i, colour in enumerate(colours) if colour in item)

    return np.stack([towards(**{f"a{axis(item)}": 3.0}) for item in items])


@contextmanager
def embed_worker(space: Space, embed: Embed = by_colour) -> Iterator[list[dict[str, Any]]]:
    """Answer queries while the block runs; yields the payloads that were answered so far."""
    answered: list[dict[str, Any]] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            message = queue.broker().lpop(queue.EMBED_QUERIES_QUEUE)
            if message is None:
                stop.wait(0.005)
                continue
            (reply_key, payload), _, _ = json.loads(base64.b64decode(json.loads(message)["body"]))  # type: ignore[arg-type]
            embedding_rpc.answer(reply_key, payload, space_digest=space.digest, embed=embed)
            answered.append(payload)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield answered
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def space(session: Session) -> Space:
    space = make_space(session)
    session.commit()
    return space


def found(answer: Any) -> list[UUID]:
    assert answer.status_code == 200, answer.text
    return [UUID(result["image_id"]) for result in answer.json["results"]]


def search(client: Client, **body: Any) -> Any:
    return client.post(f"{API}/search", json=body)


def test_the_first_versions_example_search_is_answered(client: Client, session: Session, space: Space) -> None:
    near, far = make_image(session, vector=towards(a0=1)), make_image(session, vector=towards(a1=1))
    session.commit()
    with embed_worker(space, lambda items: np.stack([towards(a0=2, a1=0.5) for _ in items])):
        answer = search(client, query="a cat playing", k=5, threshold=0.7)
    assert found(answer) == [near.id]
    assert far.id not in found(answer)
    assert answer.json["results"][0]["similarity"] == pytest.approx(2 / np.hypot(2, 0.5), abs=1e-3)
    assert (answer.json["requested"], answer.json["shortfall"]) == (5, 4)
    assert answer.json["embedding_space"] == space.digest
    assert answer.json["exact"] is True


def test_the_vector_of_a_text_is_requested_once(client: Client, session: Session, space: Space) -> None:
    make_image(session, vector=towards(a0=1))
    session.commit()
    with embed_worker(space) as answered:
        first = search(client, query="red")
    assert len(answered) == 1
    assert found(search(client, query="red")) == found(first), "no worker runs any more"


def test_equal_searches_at_once_request_the_vector_once(client: Client, session: Session, space: Space) -> None:
    image = make_image(session, vector=towards(a0=1))
    session.commit()
    with embed_worker(space) as answered, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: search(client, query="red"), range(16)))
    assert [found(answer) for answer in answers] == [[image.id]] * 16
    assert len(answered) == 1


def test_an_answer_is_cached_until_its_collection_changes(client: Client, session: Session, space: Space) -> None:
    image = make_image(session, vector=towards(a0=1), caption="before")
    session.commit()
    with embed_worker(space):
        first = search(client, query="red").json
    session.execute(update(Image).values(caption="behind the product's back"))
    session.commit()
    assert search(client, query="red").json == first
    assert search(client, query="red", k=3).json != first
    client.patch(f"{API}/images/{image.id}", json={"caption": "after"})
    assert search(client, query="red").json["results"][0]["caption"] == "after"


def test_a_query_image_may_be_sent_as_base64_or_as_a_file(client: Client, session: Session, space: Space) -> None:
    by_axis = [make_image(session, vector=towards(**{f"a{axis}": 1.0})) for axis in range(3)]
    session.commit()
    blue = picture("blue")
    with embed_worker(space) as answered:
        as_text = search(client, image=base64.b64encode(blue).decode(), k=1)
        sent = {"image": (io.BytesIO(blue), "b.png"), "k": "1", "filter": '{"collection": "shared"}'}
        as_file = client.post(f"{API}/search", data=sent)
    assert found(as_text) == found(as_file) == [by_axis[2].id]
    assert queue.broker().exists(*(payload["image_key"] for payload in answered)) == 0


def test_a_large_query_image_is_scaled_down_for_the_worker(client: Client, session: Session, space: Space) -> None:
    make_image(session, vector=towards(a1=1))
    session.commit()
    sizes: list[tuple[int, int]] = []

    def embed(items: Sequence[Any]) -> Vector:
        sizes.extend(item.size for item in items)
        return by_colour(items)

    with embed_worker(space, embed):
        answer = client.post(f"{API}/search", data={"image": (io.BytesIO(picture("lime", size=(2000, 1000))), "x")})
    assert found(answer)
    assert sizes == [(512, 256)]


def test_a_query_of_text_and_image_is_the_sum_of_their_directions(
    client: Client, session: Session, space: Space
) -> None:
    between = make_image(session, vector=towards(a0=1, a2=1))
    for axis in ("a0", "a2"):
        make_image(session, vector=towards(**{axis: 1.0}))
    session.commit()
    with embed_worker(space):
        answer = search(client, query="red", image=base64.b64encode(picture("blue")).decode(), k=3)
    assert found(answer)[0] == between.id
    assert answer.json["results"][0]["similarity"] == pytest.approx(1, abs=1e-3)


def test_a_search_by_an_image_of_the_corpus_needs_no_worker(client: Client, session: Session, space: Space) -> None:
    first, second = (make_image(session, vector=towards(a0=1, a1=tilt)) for tilt in (0.0, 0.5))
    pending = make_image(session)
    session.commit()
    assert found(search(client, image_id=str(first.id))) == [first.id, second.id]
    waiting = search(client, image_id=str(pending.id))
    assert (waiting.status_code, waiting.json["code"]) == (422, "reference_unavailable")
    absent = search(client, image_id=str(uuid4()))
    assert (absent.status_code, absent.json["code"]) == (404, "not_found")


def test_diversity_prefers_different_images(client: Client, session: Session, space: Space) -> None:
    best = make_image(session, vector=towards(a0=1, a1=0.1))
    twin = make_image(session, vector=towards(a0=1, a1=0.11))
    other = make_image(session, vector=towards(a0=1, a2=0.8))
    session.commit()
    with embed_worker(space):
        assert found(search(client, query="red", k=2)) == [best.id, twin.id]
        assert found(search(client, query="red", k=2, diversity=0.9)) == [best.id, other.id]


def test_a_filter_is_applied_and_a_deleted_image_is_not_found(client: Client, session: Session, space: Space) -> None:
    tagged, other = (make_image(session, vector=towards(a0=1), tags=tags) for tags in (["x"], []))
    session.commit()
    with embed_worker(space):
        assert found(search(client, query="red", filter={"tags": ["x"]})) == [tagged.id]
        client.delete(f"{API}/images/{tagged.id}")
        assert found(search(client, query="red")) == [other.id]


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches wait at most 0.3 s for their vector."""
    monkeypatch.setenv("AFTERIMAGE_RETRIEVAL__TEXT_TIMEOUT_S", "0.3")


def test_without_a_worker_a_search_is_refused_in_time_with_retry_after(
    short_timeout: None, client: Client, session: Session
) -> None:
    nothing_yet = search(client, query="red")
    assert (nothing_yet.status_code, nothing_yet.json["code"]) == (503, "embedding_unavailable")
    make_space(session)
    session.commit()
    asked = time.monotonic()
    silent = search(client, query="red")
    assert time.monotonic() - asked < 3
    assert (silent.status_code, silent.json["code"]) == (503, "embedding_unavailable")
    assert int(silent.headers["Retry-After"]) >= 1


def test_an_answer_from_another_embedding_space_is_not_used(client: Client, session: Session, space: Space) -> None:
    make_image(session, vector=towards(a0=1))
    session.commit()
    with embed_worker(Space(id=99, digest="another", model="x", dim=DIM)):
        answer = search(client, query="red")
    assert (answer.status_code, answer.json["code"]) == (503, "embedding_unavailable")
    with embed_worker(space):
        assert found(search(client, query="red")), "the wrong answer was not cached"


def test_an_error_of_the_worker_fails_the_search_at_once(client: Client, space: Space) -> None:
    def embed(items: Sequence[Any]) -> Vector:
        raise EmbeddingError("The model fell over.")

    asked = time.monotonic()
    with embed_worker(space, embed):
        answer = search(client, query="red")
    assert (answer.status_code, answer.json["code"], answer.json["detail"]) == (
        500,
        "embedding_failed",
        "The model fell over.",
    )
    assert time.monotonic() - asked < 3


# --- retrieval plans ----------------------------------------------------------------------------------------------


def test_the_plan_shows_which_references_would_be_used_and_why(client: Client, session: Session, space: Space) -> None:
    used = make_image(session, vector=towards(a0=1, a1=0.2), caption="used")
    also = make_image(session, vector=towards(a0=1, a2=0.7), caption="also used")
    gated = make_image(session, vector=towards(a0=1, a3=3), caption="too far")
    workers.publish_capabilities(session, "cheap", Capabilities(**{**dict(CAPABILITIES), "modes": ["image_prompt"]}))
    session.commit()
    with embed_worker(space):
        plan = client.get(f"{API}/rag/search?prompt=red&k=3&min_similarity=0.5").json
    assert [UUID(reference["image_id"]) for reference in plan["references"]] == [used.id, also.id, gated.id]
    assert [reference["used"] for reference in plan["references"]] == [True, True, False]
    weights = [reference["weight"] for reference in plan["references"]]
    assert weights[0] > weights[1] > weights[2] == 0
    assert sum(weights) == pytest.approx(1)
    assert (plan["mode"], plan["min_similarity"]) == ("image_prompt", 0.5)
    assert plan["mode_reason"]


def test_the_references_of_a_plan_can_be_pinned(client: Client, session: Session, space: Space) -> None:
    image = make_image(session, vector=towards(a0=1))
    session.commit()
    with embed_worker(space):
        plan = client.get(f"{API}/rag/search?prompt=red").json
    ids = [reference["image_id"] for reference in plan["references"] if reference["used"]]
    job = client.post(f"{API}/rag/generate", json={"prompt": "red", "reference_ids": ids}).json
    assert [reference["image_id"] for reference in job["parameters"]["references"]] == [str(image.id)]


def test_without_relevant_images_the_plan_uses_no_references(client: Client, session: Session, space: Space) -> None:
    make_image(session, vector=towards(a1=1))
    workers.publish_capabilities(session, "cheap", CAPABILITIES)
    session.commit()
    with embed_worker(space):
        plan = client.get(f"{API}/rag/search?prompt=red").json
    assert plan["mode"] == "none"
    assert not any(reference["used"] for reference in plan["references"])
