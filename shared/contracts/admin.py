"""Owners and their API keys, as operators see them."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from pydantic import Field

from shared.contracts.common import CollectionName, Contract, Moment, Name, PageQuery, QueryMoment, Text


class Scope(StrEnum):
    """A permission of an API key."""

    GENERATE = "generate"
    SEARCH = "search"
    CORPUS_WRITE = "corpus:write"
    ADMIN = "admin"


class OwnerCreate(Contract):
    name: Name = Field(examples=["team-a"])


class OwnerPatch(Contract):
    daily_images: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="images per day (UTC); 0: no quota; `null`: the quota of the service",
    )
    disabled: bool = Field(False, description="true: its keys are invalid; its jobs continue")


class OwnerView(Contract):
    id: UUID
    name: str
    daily_images: int | None = Field(description="the owner's own quota; `null`: the quota of the service")
    created_at: datetime
    disabled_at: datetime | None


class KeyCreate(Contract):
    name: Annotated[Text, Field(min_length=1, max_length=100)] = Field(examples=["laptop"])
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=len(Scope))] = Field(
        examples=[["generate", "search"]]
    )
    expires_in_s: float | None = Field(
        None, gt=0, le=10 * 366 * 86_400, description="seconds until the key expires; `null`: never"
    )
    collections: Annotated[list[CollectionName], Field(min_length=1, max_length=100)] | None = Field(
        None,
        description="the only collections that the key can use, by their names in the owner's requests; they must "
        "exist; not with the scope `admin`; `null`: all",
        examples=[["products"]],
    )


class KeyPatch(Contract):
    expires_at: Moment | None = Field(description="`null`: the key does not expire; a time in the past ends it now")


class KeyRotate(Contract):
    overlap_s: float = Field(
        86_400, ge=0, le=30 * 86_400, description="how long the old key stays valid beside the new one"
    )


class KeyQuery(PageQuery):
    owner_id: UUID | None = Field(None, description="only keys of this owner")


class KeyView(Contract):
    """A key without its secret."""

    id: UUID
    owner_id: UUID
    name: str
    begins_with: str = Field(
        description="first characters of the secret, by which people recognise the key", examples=["aft_x7Kq2m"]
    )
    scopes: list[Scope]
    collections: list[str] | None = Field(
        description="the only collections that the key can use; a deleted one is left out; `null`: all"
    )
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class NewKeyView(Contract):
    """A new key. Its secret is shown once."""

    key: KeyView
    secret: str = Field(description="send it as `Authorization: Bearer ...`", examples=["aft_..."])


class AuditAction(StrEnum):
    """An act that is kept in the audit. The part before the dot is the kind of its subject."""

    IMAGE_DELETED = "image.deleted"
    IMAGE_WITHDRAWN = "image.withdrawn"
    OUTPUT_DELETED = "output.deleted"
    JOB_DELETED = "job.deleted"
    COLLECTION_SHARED = "collection.shared"
    COLLECTION_UNSHARED = "collection.unshared"
    COLLECTION_CHANGED = "collection.changed"
    COLLECTION_DELETED = "collection.deleted"
    OWNER_CREATED = "owner.created"
    OWNER_CHANGED = "owner.changed"
    KEY_CREATED = "key.created"
    KEY_CHANGED = "key.changed"
    KEY_ROTATED = "key.rotated"
    KEY_REVOKED = "key.revoked"
    WEBHOOK_SECRET_ROTATED = "webhook_secret.rotated"
    SPACE_ADDED = "space.added"
    SPACE_ACTIVATED = "space.activated"
    SPACE_DROPPED = "space.dropped"

    @property
    def subject_kind(self) -> str:
        return self.value.partition(".")[0]


class AuditActor(StrEnum):
    """The caller of the API, or an operator with `scripts.admin`."""

    CALLER = "caller"
    OPERATOR = "operator"


class AuditQuery(PageQuery):
    action: AuditAction | None = Field(None, description="only this action")
    subject_id: Annotated[Text, Field(max_length=200)] | None = Field(
        None, description="only acts on the image, output, job, key or other object with this id"
    )
    created_after: QueryMoment | None = None
    created_before: QueryMoment | None = None


class AuditEventView(Contract):
    """One act, as it is kept. The service never changes or deletes it."""

    id: UUID
    created_at: datetime
    actor: AuditActor
    owner_id: UUID | None = Field(description="owner of the key that acted; `null` for an operator")
    key_prefix: str | None = Field(description="first characters of that key; `null` when API keys are off")
    action: str = Field(examples=["image.withdrawn"], description="one of `AuditAction`, or of another release")
    subject_kind: str = Field(examples=["image"])
    subject_id: str = Field(description="id of the object; for an embedding space its digest")
    details: dict[str, Any] = Field(description="what else the act was about; never a secret")
    request_id: str | None = Field(description="`X-Request-ID` of the request; `null` for an operator")
