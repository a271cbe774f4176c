"""Webhooks as their owner sees them: what was told to whom, and how the telling went."""

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import Field

from shared.contracts.common import Contract, PageQuery


class DeliveryState(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class DeliveryView(Contract):
    """One event on its way to one receiver."""

    id: UUID = Field(description="the `webhook-id` that the receiver sees, the same over all tries")
    job_id: UUID | None = Field(description="none when it is not about a job")
    seq: int | None = Field(description="number of the job's event")
    type: str = Field(description="of the body", examples=["job.succeeded"])
    url: str
    state: DeliveryState = Field(description="`failed`: no more tries, unless it is redelivered")
    attempts: int = Field(description="tries so far")
    last_status: int | None = Field(description="what the receiver answered to the last one; none: nothing")
    last_error: str | None = Field(description="why the last one was no success")
    due_at: datetime | None = Field(description="when it is tried next, while `pending`")
    created_at: datetime
    delivered_at: datetime | None


class DeliveryQuery(PageQuery):
    job_id: UUID | None = Field(None, description="only what was told of this job")
    state: DeliveryState | None = None


class WebhookSecretView(Contract):
    """A new signing secret. It is shown once."""

    secret: str = Field(description="for any library of Standard Webhooks", examples=["whsec_..."])
    others_until: datetime = Field(description="until then the secrets before it sign beside it")
