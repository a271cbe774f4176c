"""Webhook deliveries as their owner sees them."""

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
    """The delivery of one event to one receiver."""

    id: UUID = Field(description="the `webhook-id` that the receiver sees, equal in all attempts")
    job_id: UUID | None = Field(description="`null` if the event is not about a job")
    seq: int | None = Field(description="number of the job's event; `null` without a job")
    type: str = Field(description="type of the event", examples=["job.succeeded"])
    url: str
    state: DeliveryState = Field(description="`failed`: no more attempts, unless the owner asks for a redelivery")
    attempts: int = Field(description="attempts so far")
    last_status: int | None = Field(description="HTTP status of the last attempt; `null`: the receiver did not answer")
    last_error: str | None = Field(description="reason why the last attempt failed")
    due_at: datetime | None = Field(description="time of the next attempt, while `pending`")
    created_at: datetime
    delivered_at: datetime | None


class DeliveryQuery(PageQuery):
    job_id: UUID | None = Field(None, description="only deliveries about this job")
    state: DeliveryState | None = None


class WebhookSecretView(Contract):
    """A new signing secret. It is shown once."""

    secret: str = Field(description="signing secret for any library of Standard Webhooks", examples=["whsec_..."])
    others_until: datetime = Field(description="until then the previous secrets sign too")
