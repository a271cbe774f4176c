"""Collections of images: their description, their defaults, and the access of other owners."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated
from uuid import UUID

from pydantic import Field

from shared.contracts.common import CollectionName, Contract, Name, PageQuery, Text
from shared.contracts.search import SearchMode

Description = Annotated[Text, Field(max_length=2000)]


class Access(StrEnum):
    """The access of a caller to a collection. Each includes the ones before it."""

    READ = "read"  # list and search its images, and use them as references
    WRITE = "write"  # also upload, change and delete images
    OWNER = "owner"  # also change, share and delete the collection


class GrantedAccess(StrEnum):
    """The access that an owner can give to another owner."""

    READ = "read"
    WRITE = "write"


class CollectionDefaults(Contract):
    """Values of requests that search this collection and do not set their own. `null`: the value of the service."""

    min_similarity: float | None = Field(None, ge=-1, le=1, description="lowest cosine of a reference that is used")
    k: int | None = Field(None, ge=1, le=16, description="number of references of a generation")
    mode: SearchMode | None = Field(None, description="how images are searched")


class CollectionCreate(Contract):
    """A new collection of the caller."""

    name: Name = Field(examples=["products"])
    description: Description | None = None
    defaults: CollectionDefaults = CollectionDefaults()


class CollectionPatch(Contract):
    """New values for the given fields. Other fields keep their values; `defaults` replaces all defaults."""

    name: Name | None = Field(None, description="new name; the old one is free at once; `null`: the name stays")
    description: Description | None = None
    defaults: CollectionDefaults = CollectionDefaults()


class CollectionQuery(PageQuery):
    name: CollectionName | None = Field(None, description="only the collection that a filter finds under this name")


class CollectionView(Contract):
    id: UUID
    name: str = Field(description="its name in the caller's requests; `owner/name` for a collection of another owner")
    owner: str | None = Field(description="name of its owner; `null` for the collection `shared` of all owners")
    access: Access = Field(description="what the caller may do with it, within the scopes of its key")
    description: str | None
    defaults: CollectionDefaults
    images: int = Field(description="number of its images, in every state")
    created_at: datetime
    url: str


class GrantRequest(Contract):
    access: GrantedAccess


class GrantView(Contract):
    """The access of another owner to a collection."""

    collection_id: UUID
    owner: str = Field(description="name of the owner who has the access", examples=["team-b"])
    access: GrantedAccess
    created_at: datetime
