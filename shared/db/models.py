"""The tables.

Vector tables are not here: each embedding space has its own, made when its model first runs (`shared.db.spaces`).
"""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012 - read once by SQLAlchemy
        str: Text,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        dict[str, str]: JSONB,
        dict[str, float]: JSONB,
        list[str]: ARRAY(Text),
        float: Double,
        bytes: LargeBinary,
    }


class Owner(Base):
    """Who jobs, collections and quotas belong to."""

    __tablename__ = "owners"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    disabled_at: Mapped[datetime | None]


class ApiKey(Base):
    """A way to act as an owner. Only the hash of the secret is kept: it has 256 random bits, so SHA-256 is enough."""

    __tablename__ = "api_keys"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    secret_sha256: Mapped[bytes] = mapped_column(unique=True)
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Collection(Base):
    """A named set of images. `version` rises with every change, so that cached searches can carry it in their key."""

    __tablename__ = "collections"
    __table_args__ = (UniqueConstraint("owner_id", "name"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"))
    name: Mapped[str]
    shared: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    version: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Image(Base):
    """One image of one collection. Its bytes lie in the blob store under their content, shared by equal images."""

    __tablename__ = "images"
    __table_args__ = (
        UniqueConstraint("collection_id", "sha256"),
        CheckConstraint("state in ('pending', 'ready', 'failed')", name="state"),
        Index(None, "collection_id", text("created_at desc"), text("id desc")),
        Index(None, "tags", postgresql_using="gin"),
        Index(None, "attributes", postgresql_using="gin", postgresql_ops={"attributes": "jsonb_path_ops"}),
        # The outbox of the embedding work: what is stored and has no vector yet.
        Index("ix_images_pending", "created_at", postgresql_where=text("state = 'pending'")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    collection_id: Mapped[UUID] = mapped_column(ForeignKey("collections.id", ondelete="CASCADE"))
    state: Mapped[str] = mapped_column(server_default="pending")
    error_code: Mapped[str | None]
    sha256: Mapped[str]
    blob_key: Mapped[str]
    thumbnail_key: Mapped[str]
    format: Mapped[str]
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    perceptual_hash: Mapped[int] = mapped_column(BigInteger)
    caption: Mapped[str | None]
    tags: Mapped[list[str]] = mapped_column(server_default="{}")
    source: Mapped[str | None]
    licence: Mapped[str | None]
    attributes: Mapped[dict[str, str]] = mapped_column(server_default="{}")
    filename: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    lease_until: Mapped[datetime | None]


class EmbeddingSpace(Base):
    """What makes vectors comparable: model, weights and preprocessing, by digest. One of them is active."""

    __tablename__ = "embedding_spaces"
    __table_args__ = (
        Index("uq_embedding_spaces_active", "active", unique=True, postgresql_where=text("active")),
        CheckConstraint("dim between 1 and 4000", name="dim"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    model: Mapped[str]
    dim: Mapped[int] = mapped_column(Integer)
    active: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Job(Base):
    """What a user submitted. While `queued` the row is its own outbox; while `processing` it carries its lease."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(
            "state in ('queued', 'processing', 'succeeded', 'failed', 'canceled', 'expired', 'dead')", name="state"
        ),
        CheckConstraint("(state = 'processing') = (lease_until is not null)", name="lease"),
        CheckConstraint("(state in ('queued', 'processing')) = (finished_at is null)", name="finished"),
        Index(None, "owner_id", text("created_at desc"), text("id desc")),
        Index(
            "ix_jobs_waiting",
            "model",
            "lane",
            "owner_id",
            "created_at",
            "id",
            postgresql_where=text("state = 'queued' and published_at is null"),
        ),
        Index("ix_jobs_published", "model", postgresql_where=text("state = 'queued' and published_at is not null")),
        Index("ix_jobs_leases", "lease_until", postgresql_where=text("state = 'processing'")),
        Index("ix_jobs_deadlines", "expires_at", postgresql_where=text("state = 'queued' and expires_at is not null")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"))
    kind: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="queued")
    lane: Mapped[int] = mapped_column(SmallInteger)
    model: Mapped[str]
    images: Mapped[int] = mapped_column(Integer)
    parameters: Mapped[dict[str, Any]]
    job_metadata: Mapped[dict[str, str]] = mapped_column("metadata", server_default="{}")
    webhook: Mapped[dict[str, Any] | None]
    retry_of: Mapped[UUID | None]  # no foreign key: the job that it tries again may be deleted
    resolution: Mapped[dict[str, Any] | None]
    timings: Mapped[dict[str, float]] = mapped_column(server_default="{}")

    attempt: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    crashes: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    transient_retries: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    worker: Mapped[str | None]
    model_started: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    lease_until: Mapped[datetime | None]
    run_after: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    timeout_s: Mapped[float]
    published_at: Mapped[datetime | None]
    published_lane: Mapped[int | None] = mapped_column(SmallInteger)

    last_seq: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class IdempotencyKey(Base):
    """What an `Idempotency-Key` has already led to. No foreign key: the answer outlives the job."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index(None, "created_at"),)

    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"), primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    answer: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class JobEvent(Base):
    """The story of a job, numbered from 1 without gaps."""

    __tablename__ = "job_events"

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    type: Mapped[str]
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    data: Mapped[dict[str, Any]] = mapped_column(server_default="{}")


class WebhookSecret(Base):
    """What signs an owner's webhooks. After a rotation the old one signs too, until it expires."""

    __tablename__ = "webhook_secrets"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"), index=True)
    secret: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]


class WebhookDelivery(Base):
    """One event on its way to one receiver: written with the event, so that neither exists without the other."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("state in ('pending', 'delivered', 'failed')", name="state"),
        ForeignKeyConstraint(["job_id", "seq"], ["job_events.job_id", "job_events.seq"], ondelete="CASCADE"),
        UniqueConstraint("job_id", "seq"),
        Index("ix_webhook_deliveries_due", "due_at", postgresql_where=text("state = 'pending'")),
        Index("ix_webhook_deliveries_leases", "host", "lease_until", postgresql_where=text("lease_until is not null")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"))
    job_id: Mapped[UUID]
    seq: Mapped[int] = mapped_column(BigInteger)
    url: Mapped[str]
    host: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="pending")
    attempts: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    due_at: Mapped[datetime] = mapped_column(server_default=func.now())
    lease_until: Mapped[datetime | None]
    last_status: Mapped[int | None] = mapped_column(Integer)
    last_error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    delivered_at: Mapped[datetime | None]


class Generation(Base):
    """One image that a job generated."""

    __tablename__ = "generations"
    __table_args__ = (
        UniqueConstraint("job_id", "index"),
        Index(None, "owner_id", text("created_at desc"), text("id desc")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"))
    index: Mapped[int] = mapped_column(Integer)
    seed: Mapped[int] = mapped_column(BigInteger)
    format: Mapped[str]
    blob_key: Mapped[str]
    thumbnail_key: Mapped[str]
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    pixels_sha256: Mapped[str]
    provenance: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class GenerationReference(Base):
    """A memory that shaped an output. No foreign key to images: the record outlives the image it names."""

    __tablename__ = "generation_references"

    generation_id: Mapped[UUID] = mapped_column(ForeignKey("generations.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    image_id: Mapped[UUID] = mapped_column(index=True)
    sha256: Mapped[str]
    similarity: Mapped[float | None]
    weight: Mapped[float]
    pinned: Mapped[bool] = mapped_column(Boolean)
    caption: Mapped[str | None]


class Worker(Base):
    """A live worker process; one that stops renewing `heartbeat_at` is gone."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    model: Mapped[str | None]
    state: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ModelRecord(Base):
    """What a generator can do, as its last loaded worker found it."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    capabilities: Mapped[dict[str, Any]]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
