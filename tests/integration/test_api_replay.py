"""Asking for an output to be drawn again, as far as no worker is needed."""

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from shared.db.tables import Generation, GenerationReference, Job
from tests.factories import make_image
from tests.integration.conftest import API, Client
from tests.integration.test_api_jobs import code
from tests.integration.test_api_search import towards
from tests.integration.test_export_outputs import generate


@pytest.fixture
def output(session: Session) -> Generation:
    """Drawn from one image, which is there."""
    memory = make_image(session, vector=towards(a0=1))
    output = generate(session, 7)
    session.execute(update(GenerationReference).values(image_id=memory.id, weight=0.25))
    session.commit()
    return output


def replay(client: Client, output_id: object, **headers: str) -> Any:
    return client.post(f"{API}/generations/{output_id}/replay", headers=headers)


def jobs_of(session: Session) -> int:
    session.rollback()
    return len(session.scalars(select(Job.id)).all())


def test_a_replay_is_a_job_of_one_image_with_what_the_record_says(client: Client, output: Generation) -> None:
    answer = replay(client, output.id)
    assert answer.status_code == 202
    assert answer.headers["Location"] == answer.json["url"]
    assert (answer.json["replay_of"], answer.json["kind"]) == (str(output.id), "rag_generate")
    parameters, recorded = answer.json["parameters"], output.provenance["parameters"]
    assert (parameters["seeds"], parameters["mode"], parameters["k"]) == ([7], "image_prompt", 0)
    assert [each["weight"] for each in parameters["references"]] == [0.25]
    own = {"seeds", "mode", "k", "references"}
    assert {name: value for name, value in parameters.items() if name not in own} == {
        name: value for name, value in recorded.items() if name not in own
    }


def test_an_output_without_memories_is_drawn_again_without(
    client: Client, session: Session, output: Generation
) -> None:
    session.execute(delete(GenerationReference))
    session.execute(update(Generation).values(provenance={**output.provenance, "mode": "none"}))
    session.commit()
    answer = replay(client, output.id)
    assert (answer.json["kind"], answer.json["parameters"]["references"]) == ("generate", [])


def test_a_key_that_is_known_makes_no_second_job_and_belongs_to_one_output(
    client: Client, session: Session, output: Generation
) -> None:
    first, again = (replay(client, output.id, **{"Idempotency-Key": "k"}) for _ in range(2))
    assert (again.json["id"], again.headers["Idempotent-Replayed"]) == (first.json["id"], "true")
    made = jobs_of(session)
    other = generate(session, 8)
    assert code(replay(client, other.id, **{"Idempotency-Key": "k"})) == (422, "idempotency_key_reused")
    assert jobs_of(session) == made + 1, "that of the other output itself"


def test_what_is_not_there_or_of_somebody_else_is_not_drawn_again(client: Client, session: Session) -> None:
    assert code(replay(client, uuid4())) == (404, "not_found")
    assert code(replay(client, generate(session, 9, owner="somebody").id)) == (404, "not_found")


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"model": "gone"}, (422, "model_not_found")),
        ({"invented_later": 1}, (409, "original_unreadable")),
        ({"width": "wide"}, (409, "original_unreadable")),
    ],
)
def test_what_cannot_be_drawn_any_more_is_refused_and_nothing_is_queued(
    client: Client, session: Session, output: Generation, change: dict[str, Any], refusal: tuple[int, str]
) -> None:
    parameters = {**output.provenance["parameters"], **change}
    session.execute(update(Generation).values(provenance={**output.provenance, "parameters": parameters}))
    session.commit()
    before = jobs_of(session)
    assert code(replay(client, output.id)) == refusal
    assert jobs_of(session) == before


def test_a_memory_that_is_gone_is_named(client: Client, session: Session, output: Generation) -> None:
    session.execute(update(GenerationReference).values(image_id=(gone := uuid4())))
    session.commit()
    answer = replay(client, output.id)
    assert code(answer) == (422, "reference_unavailable")
    assert answer.json["context"]["image_ids"] == [str(gone)]
