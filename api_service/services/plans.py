"""Plans: signed tokens with the references that a search has shown, so that a generation draws from exactly these.

The service stores no plan: the token holds it. Only the owner that the token names can use it.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pydantic
from itsdangerous import BadData, URLSafeTimedSerializer
from sqlalchemy.orm import Session

from api_service.http.auth import Caller
from shared import retrieval
from shared.contracts.common import Contract
from shared.contracts.generation import PinnedReference
from shared.contracts.search import ImageFilter
from shared.db import images, spaces
from shared.db.spaces import Space
from shared.errors import PlanExpiredError, PlanInvalidError, PlanMismatchError, PlanOutdatedError
from shared.settings import get_settings

PURPOSE = "afterimage.plan.1"
"""The key of a plan's signature is derived from this. A new form of the content needs a new number."""


class _Reference(Contract):
    image_id: UUID
    weight: float
    concepts: list[int]
    """Positions in `_Content.concepts`."""


class _Content(Contract):
    owner_id: UUID
    space: str
    model: str
    prompt_sha256: str
    where: ImageFilter
    min_similarity: float
    concepts: list[str]
    references: list[_Reference]


@dataclass(frozen=True)
class RedeemedPlan:
    """The references of a plan that may be used now."""

    made_at: datetime
    where: ImageFilter
    min_similarity: float
    concepts: list[str]
    """Everything that was searched, also if nothing was found for it."""
    references: list[PinnedReference]


def issue(
    plan: retrieval.Plan,
    *,
    prompt: str,
    model: str,
    space: Space,
    where: ImageFilter,
    min_similarity: float,
    caller: Caller,
) -> str | None:
    """Return the token of a plan; `None`: the service has no keys to sign it.

    where, min_similarity: how it was searched. They are only recorded.
    """
    serializer = _serializer()
    if serializer is None:
        return None
    concepts = [concept.text for concept in plan.concepts]
    content = _Content(
        owner_id=caller.owner_id,
        space=space.digest,
        model=model,
        prompt_sha256=_digest(prompt),
        where=where,
        min_similarity=min_similarity,
        concepts=concepts,
        references=[
            _Reference(
                image_id=candidate.scored.image.id,
                weight=candidate.weight,
                concepts=[concepts.index(text) for text in candidate.concepts if text in concepts],
            )
            for candidate in plan.candidates
            if candidate.used
        ],
    )
    token = serializer.dumps(content.model_dump(mode="json", exclude_defaults=True))
    return token if isinstance(token, str) else token.decode()


def redeem(session: Session, token: str, *, prompt: str, model: str, caller: Caller) -> RedeemedPlan:
    """Return the references of a plan.

    prompt, model: those of the request.

    Raises:
        PlanInvalidError: this service did not issue the token, or issued it to another owner.
        PlanExpiredError: it is older than `retrieval.plan_expires_s`.
        PlanMismatchError: it was made for another prompt or model.
        PlanOutdatedError: an image of it is gone, or another embedding space is active.
    """
    content, made_at = _read(token)
    if content.owner_id != caller.owner_id:
        raise PlanInvalidError
    # Not by the serializer: it also refuses a token from an API process whose clock is a second ahead.
    if datetime.now(UTC) - made_at > timedelta(seconds=get_settings().retrieval.plan_expires_s):
        raise PlanExpiredError
    differs = [
        name
        for name, equal in (("prompt", content.prompt_sha256 == _digest(prompt)), ("model", content.model == model))
        if not equal
    ]
    if differs:
        raise PlanMismatchError(fields=differs)
    space = spaces.find_active(session)
    if space is None or space.digest != content.space:
        raise PlanOutdatedError("The plan is for another embedding space than the active one. Search for a new plan.")
    ids = [reference.image_id for reference in content.references]
    searchable = images.filter_searchable(session, space, ids, principal=caller.principal)
    if missing := [str(image_id) for image_id in ids if image_id not in searchable]:
        raise PlanOutdatedError("An image of the plan is gone. Search for a new plan.", image_ids=missing)
    references = [
        PinnedReference.recorded(
            each.image_id, each.weight, concepts=[content.concepts[i] for i in each.concepts], pinned=False
        )
        for each in content.references
    ]
    return RedeemedPlan(made_at, content.where, content.min_similarity, content.concepts, references)


def _read(token: str) -> tuple[_Content, datetime]:
    serializer = _serializer()
    if serializer is None:
        raise PlanInvalidError("This service has no keys to sign plans, so it accepts none.")
    try:
        payload, made_at = serializer.loads(token, return_timestamp=True)
        return _Content.model_validate(payload), made_at
    except (BadData, pydantic.ValidationError):
        raise PlanInvalidError from None


def _serializer() -> URLSafeTimedSerializer | None:
    keys = [key.get_secret_value() for key in get_settings().security.signing_keys]
    if not keys:
        return None
    # itsdangerous wants the oldest key first.
    options = {"key_derivation": "hmac", "digest_method": hashlib.sha256}
    return URLSafeTimedSerializer(keys[::-1], salt=PURPOSE, signer_kwargs=options)


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()
