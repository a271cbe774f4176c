"""The description of a file, merged with what people have set or removed."""

from typing import Any

import pytest

from api_service.services.file_description import merge
from shared.contracts.images import ImageDescription
from shared.errors import ValidationError

EMPTY = ImageDescription().model_dump()
BEFORE = EMPTY | {"caption": "a cat", "tags": ["cat", "old"], "attributes": {"shelf": "1", "room": "2"}}


def merged(*, current: dict[str, Any], before: dict[str, Any] | None = BEFORE, **now: Any) -> dict[str, Any]:
    changed = merge(BEFORE | current, before, ImageDescription(**{**BEFORE, **now})).model_dump()
    return {name: value for name, value in changed.items() if value != BEFORE[name]}


@pytest.mark.parametrize(
    ("current", "now", "result"),
    [
        ({"tags": ["cat", "mine"]}, {}, {"tags": ["cat", "mine"]}),  # set and removed by hand; the file is unchanged
        ({"tags": ["cat", "old", "mine"]}, {"tags": ["cat", "new"]}, {"tags": ["cat", "mine", "new"]}),
        ({"tags": ["old"]}, {"tags": ["cat"]}, {"tags": []}),  # "cat" was removed by hand, "old" from the file
        ({"caption": "mine"}, {}, {"caption": "mine"}),
        ({"caption": "mine"}, {"caption": "a black cat"}, {"caption": "mine"}),
        ({"caption": None}, {}, {"caption": None}),
        ({}, {"caption": "a black cat"}, {"caption": "a black cat"}),
        ({}, {"caption": None}, {"caption": None}),
        ({"attributes": {"shelf": "9", "mine": "x"}}, {"attributes": {"shelf": "2", "new": "n"}},
         {"attributes": {"shelf": "9", "mine": "x", "new": "n"}}),
        ({}, {"attributes": {"shelf": "2"}}, {"attributes": {"shelf": "2"}}),
    ],
)  # fmt: skip
def test_changes_of_the_file_are_applied_and_those_of_people_stay(
    current: dict[str, Any], now: dict[str, Any], result: dict[str, Any]
) -> None:
    assert merged(current=current, **now) == result


def test_a_file_only_adds_while_its_earlier_description_is_unknown() -> None:
    current = EMPTY | {"caption": "mine", "tags": ["mine"], "attributes": {"shelf": "9"}}
    now = ImageDescription(caption="file", licence="CC0", tags=["cat"], attributes={"shelf": "1", "room": "2"})
    changed = merge(current, None, now)
    assert (changed.caption, changed.licence, changed.tags) == ("mine", "CC0", ["mine", "cat"])
    assert changed.attributes == {"shelf": "9", "room": "2"}


def test_a_result_with_too_many_tags_is_refused() -> None:
    tags = [f"mine {number}" for number in range(32)]
    with pytest.raises(ValidationError):
        merge(EMPTY | {"tags": tags}, None, ImageDescription(tags=["one more"]))
