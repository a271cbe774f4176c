"""A person's choices among the references that the page `create` shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from werkzeug.datastructures import MultiDict

from api_service.http import requests
from shared.contracts.generation import PinnedReference


@dataclass(frozen=True)
class Choices:
    """A person's choices among the references that a form shows. The other references were only shown.

    A choice is a difference between what the form was sent with and what the service had put into it.
    """

    pinned: Sequence[str]
    used: Sequence[str]
    """References that are used and not pinned, by id, in the order of the form."""
    dropped: frozenset[str]
    """References of the plan that the person does not want."""
    added: frozenset[str]
    """References that the plan does not use."""
    weights: Mapping[str, str]
    """Weights that the person set, by id."""
    shown_weights: Mapping[str, str]
    """Weights that the service has put into the form, by id."""

    @classmethod
    def of(cls, form: "MultiDict[str, str]") -> Self:
        planned = dict(pair.split("=", 1) for pair in form.get("planned", "").split() if "=" in pair)
        pinned = list(dict.fromkeys(form.getlist("pin")))
        used = [each for each in dict.fromkeys(form.getlist("use")) if each not in pinned]
        shown = {each: form.get(f"shown.{each}", planned.get(each, "")) for each in (*planned, *pinned, *used)}
        sent = {each: form.get(f"weight.{each}", "").strip() for each in shown}
        return cls(
            pinned=pinned,
            used=used,
            dropped=frozenset(planned).difference(used, pinned),
            added=frozenset(used).difference(planned),
            weights={each: weight for each, weight in sent.items() if weight and weight != shown[each]},
            shown_weights=shown,
        )

    @property
    def named(self) -> list[str]:
        """Ids of the references that the person chose something for, apart from pins."""
        return [*dict.fromkeys([*self.dropped, *self.added, *self.weights])]

    @property
    def changes_plan(self) -> bool:
        in_use = {*self.pinned, *self.used}
        return bool(self.pinned or self.dropped or self.added or in_use.intersection(self.weights))

    def references(self, form: "MultiDict[str, str]") -> list[PinnedReference]:
        """Return the references that the form uses; only those that the person chose are marked as pinned.

        Raises:
            ValidationError: an id or a weight is not valid.
        """
        return [
            requests.parse_form(
                PinnedReference,
                {
                    "image_id": each,
                    "weight": self.weights.get(each) or self.shown_weights[each] or None,
                    "concepts": form.getlist(f"concept.{each}"),
                    "pinned": each in self.pinned or each in self.added or each in self.weights,
                },
            )
            for each in (*self.pinned, *self.used)
        ]
