"""Requests to replay an output, as far as they need no worker."""

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from shared.db.tables import Job, Output, OutputReference
from tests.factories import make_image
from tests.integration.conftest import API, Client
from tests.integration.test_api_jobs import code
from tests.integration.test_api_search import towards
from tests.integration.test_export_outputs import make_output


@pytest.fixture
def output(session: Session) -> Output:
    """An output with one reference, whose image exists."""
    image = make_image(session, vector=towards(a0=1))
    output = make_output(session, 7)
    session.execute(update(OutputReference).values(image_id=image.id, weight=0.25))
    session.commit()
    return output


def replay(client: Client, output_id: object, **headers: str) -> Any:
    return client.post(f"{API}/generations/{output_id}/replay", headers=headers)


def count_jobs(session: Session) -> int:
    session.rollback()
    return len(session.scalars(select(Job.id)).all())


def test_a_replay_is_a_job_of_one_image_with_the_recorded_parameters(client: Client, output: Output) -> None:
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


def test_an_output_without_references_is_replayed_without_references(
    client: Client, session: Session, output: Output
) -> None:
    session.execute(delete(OutputReference))
    session.execute(update(Output).values(provenance={**output.provenance, "mode": "none"}))
    session.commit()
    answer = replay(client, output.id)
    assert (answer.json["kind"], answer.json["parameters"]["references"]) == ("generate", [])


def test_a_weight_that_was_rounded_to_zero_stays_the_smallest(client: Client, session: Session, output: Output) -> None:
    session.execute(update(OutputReference).values(weight=0.0))
    session.commit()
    answer = replay(client, output.id)
    assert answer.status_code == 202, answer.text
    assert 0 < answer.json["parameters"]["references"][0]["weight"] < 1e-300


def test_an_idempotency_key_creates_one_replay_and_belongs_to_one_output(
    client: Client, session: Session, output: Output
) -> None:
    first, again = (replay(client, output.id, **{"Idempotency-Key": "k"}) for _ in range(2))
    assert (again.json["id"], again.headers["Idempotent-Replayed"]) == (first.json["id"], "true")
    made = count_jobs(session)
    other = make_output(session, 8)
    assert code(replay(client, other.id, **{"Idempotency-Key": "k"})) == (422, "idempotency_key_reused")
    assert count_jobs(session) == made + 1, "only the job that made the other output"


def test_an_unknown_output_and_one_of_another_owner_are_not_found(client: Client, session: Session) -> None:
    assert code(replay(client, uuid4())) == (404, "not_found")
    assert code(replay(client, make_output(session, 9, owner="somebody").id)) == (404, "not_found")


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"model": "gone"}, (422, "model_not_found")),
        ({"invented_later": 1}, (409, "original_unreadable")),
        ({"width": "wide"}, (409, "original_unreadable")),
    ],
)
def test_a_replay_that_is_no_longer_possible_is_refused_and_not_queued(
    client: Client, session: Session, output: Output, change: dict[str, Any], refusal: tuple[int, str]
) -> None:
    parameters = {**output.provenance["parameters"], **change}
    session.execute(update(Output).values(provenance={**output.provenance, "parameters": parameters}))
    session.commit()
    before = count_jobs(session)
    assert code(replay(client, output.id)) == refusal
    assert count_jobs(session) == before


def test_a_deleted_reference_is_named(client: Client, session: Session, output: Output) -> None:
    session.execute(update(OutputReference).values(image_id=(gone := uuid4())))
    session.commit()
    answer = replay(client, output.id)
    assert code(answer) == (422, "reference_unavailable")
    assert answer.json["context"]["image_ids"] == [str(gone)]
