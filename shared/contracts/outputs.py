"""Queries for generated images."""

from uuid import UUID

from pydantic import Field

from shared.contracts.common import PageQuery


class OutputQuery(PageQuery):
    reference_id: UUID | None = Field(None, description="only outputs that used this image")
