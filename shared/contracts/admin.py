"""Owners and their API keys, as operators see them."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated
from uuid import UUID

from pydantic import Field

from shared.contracts.common import Contract, Moment, Name, PageQuery, Text


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
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class NewKeyView(Contract):
    """A new key. Its secret is shown once."""

    key: KeyView
    secret: str = Field(description="send it as `Authorization: Bearer ...`", examples=["aft_..."])
