"""The two columns of a job's parameters, and the record of a file without its prompt."""

from typing import Any

import pytest

from shared.db.tables import NEW_PARAMETERS, Job, split_parameters
from shared.settings import get_settings
from worker_service.jobs.content_credentials import record_of_file

PINNED = {"image_id": "a", "weight": 1.0, "concepts": ["a robot"], "pinned": False}
PARAMETERS: dict[str, Any] = {
    "prompt": "a robot holding a flower",
    "k": 3,
    "references": [PINNED],
    "concepts": [{"text": "a robot"}],
    "max_gap": 0.1,
}


def test_the_previous_release_gets_no_parameter_that_it_refuses() -> None:
    stored, new = split_parameters(PARAMETERS)
    assert not stored.keys() & set(NEW_PARAMETERS)
    assert stored["references"] == [{"image_id": "a", "weight": 1.0}]
    assert new is not None
    job = Job(parameters=PARAMETERS)
    assert (job.stored_parameters, job.new_parameters) == (stored, new)
    assert job.parameters == PARAMETERS


def test_parameters_that_the_previous_release_knows_are_in_one_column() -> None:
    assert split_parameters({"prompt": "a cat", "references": []}) == ({"prompt": "a cat", "references": []}, None)


def test_a_record_without_the_prompt_has_no_words_of_it_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_CONTENT_CREDENTIALS__INCLUDE_PROMPT", "false")
    get_settings.cache_clear()
    warning = {"code": "text_cut", "context": {"cut": "a flower"}}
    record = record_of_file({"parameters": PARAMETERS, "references": [PINNED], "warnings": [warning]})
    get_settings.cache_clear()
    assert "robot" not in str(record)
    assert "flower" not in str(record)
    assert record["parameters"]["k"] == 3
