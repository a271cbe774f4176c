"""The database's tables, except the vector tables.

Each embedding space has a vector table of its own, added when its model first runs: see `shared.db.spaces`.
"""

from collections.abc import Mapping
from datetime import date, datetime
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
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TSVECTOR
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Mapped, mapped_column, synonym

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
        list[UUID]: ARRAY(Uuid),
        float: Double,
        bytes: LargeBinary,
    }


class Owner(Base):
    """An owner of jobs, collections, API keys and a quota."""

    __tablename__ = "owners"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    disabled_at: Mapped[datetime | None]
    daily_images: Mapped[int | None] = mapped_column(Integer)  # None: the setting `limits.daily_images`; 0: no limit


class ImageUsage(Base):
    """Images that an owner requested on one day (UTC), without those of jobs that ended without success."""

    __tablename__ = "image_usage"

    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    images: Mapped[int] = mapped_column(Integer)


class ApiKey(Base):
    """A key to act as an owner. Only the SHA-256 of the secret is stored; it has 256 random bits, so that is enough."""

    __tablename__ = "api_keys"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    secret_sha256: Mapped[bytes] = mapped_column(unique=True)
    scopes: Mapped[list[str]]
    collection_ids: Mapped[list[UUID] | None]  # the collections that the key may use; None: all of its owner
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Collection(Base):
    """A named set of images. `version` rises with every change and is part of the keys of cached searches."""

    __tablename__ = "collections"
    __table_args__ = (
        UniqueConstraint("owner_id", "name"),
        Index("ix_collections_deleting", "deleted_at", postgresql_where=text("deleted_at is not null")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"))
    name: Mapped[str]
    shared: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))  # every owner may read and write it
    description: Mapped[str | None]
    defaults: Mapped[dict[str, Any]] = mapped_column(server_default="{}")  # a `CollectionDefaults` without its nulls
    version: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deleted_at: Mapped[datetime | None]  # hidden from then on; housekeeping deletes its images in steps


class CollectionGrant(Base):
    """The access of another owner to a collection: `read` or `write`."""

    __tablename__ = "collection_grants"
    __table_args__ = (CheckConstraint("access in ('read', 'write')", name="access"),)

    collection_id: Mapped[UUID] = mapped_column(ForeignKey("collections.id", ondelete="CASCADE"), primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"), primary_key=True, index=True)
    access: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    id: Mapped[UUID] = synonym("owner_id")  # pages of grants need a name for it


class Image(Base):
    """One image of one collection. Its bytes are in the blob store; equal images share one blob."""

    __tablename__ = "images"
    __table_args__ = (
        UniqueConstraint("collection_id", "sha256"),
        CheckConstraint("state in ('pending', 'ready', 'failed')", name="state"),
        Index(None, "collection_id", text("created_at desc"), text("id desc")),
        Index(None, "tags", postgresql_using="gin"),
        Index(None, "words", postgresql_using="gin"),
        Index(None, "attributes", postgresql_using="gin", postgresql_ops={"attributes": "jsonb_path_ops"}),
        # The outbox of the embed workers: images that are stored and have no vector yet.
        Index("ix_images_pending", "created_at", postgresql_where=text("state = 'pending'")),
        Index(
            "ix_images_leases",
            "lease_until",
            postgresql_where=text("state = 'pending' and lease_until is not null"),
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    collection_id: Mapped[UUID] = mapped_column(ForeignKey("collections.id", ondelete="CASCADE"))
    state: Mapped[str] = mapped_column(server_default="pending")
    error_code: Mapped[str | None]
    sha256: Mapped[str] = mapped_column(index=True)
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
    file_description: Mapped[dict[str, Any] | None]
    """The description that the uploader's file had last; None before this column existed."""
    filename: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    words: Mapped[str | None] = mapped_column(TSVECTOR, deferred=True)
    """The words of caption and tags, which a trigger of the database fills; see `shared.db.text_search`."""

    attempt: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    crashes: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    model_started: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    lease_until: Mapped[datetime | None]


class EmbeddingSpace(Base):
    """Vectors of one model, with its weights and preprocessing, which the digest covers. One space is active."""

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
    # The vectors that its workers added without a pause, while it was inactive.
    added: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    adding_since: Mapped[datetime | None]
    last_added_at: Mapped[datetime | None]
    # The thresholds of relevance that `scripts.calibrate` measured, as `shared.contracts.calibration` describes them.
    calibration: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    index_kind: Mapped[str] = mapped_column(server_default="halfvec")  # an `IndexKind`
    search_tuning: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))  # a `SearchTuning`


class SpaceAttempt(Base):
    """An image that a worker of an inactive space embeds, or could not embed. Deleted when its vector is stored."""

    __tablename__ = "space_attempts"

    space_id: Mapped[int] = mapped_column(ForeignKey("embedding_spaces.id", ondelete="CASCADE"), primary_key=True)
    image_id: Mapped[UUID] = mapped_column(ForeignKey("images.id", ondelete="CASCADE"), primary_key=True, index=True)
    crashes: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    lease_until: Mapped[datetime | None]
    error_code: Mapped[str | None]  # of the error that repeats; such an image is not tried again


NEW_PARAMETERS = ("concepts", "avoid", "avoid_ids", "search_mode", "max_gap", "matched_min_similarity", "planned_at")
"""Fields of `GenerationParameters` that the previous release refuses."""
NEW_REFERENCE_FIELDS = ("concepts", "pinned")
"""The same of `PinnedReference`."""


def split_parameters(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The parameters that the previous release reads, and those of this release alone."""
    new = {name: parameters[name] for name in NEW_PARAMETERS if name in parameters}
    stored = {name: value for name, value in parameters.items() if name not in new}
    references = stored.get("references") or []
    if any(each.keys() & set(NEW_REFERENCE_FIELDS) for each in references):
        new["references"] = references
        stored["references"] = [{k: v for k, v in each.items() if k not in NEW_REFERENCE_FIELDS} for each in references]
    return stored, new or None


class HasParameters:
    """A row with a `GenerationParameters` as JSON, in two columns.

    A worker of the previous release reads the first one. It draws such a job with references for the whole prompt.
    """

    stored_parameters: Mapped[dict[str, Any]] = mapped_column("parameters")
    new_parameters: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))

    @hybrid_property
    def parameters(self) -> dict[str, Any]:
        return {**self.stored_parameters, **(self.new_parameters or {})}

    @parameters.inplace.setter
    def _set_parameters(self, parameters: Mapping[str, Any]) -> None:
        self.stored_parameters, self.new_parameters = split_parameters(parameters)

    @parameters.inplace.expression
    @classmethod
    def _stored_parameters(cls) -> InstrumentedAttribute[dict[str, Any]]:
        return cls.stored_parameters


class Job(HasParameters, Base):
    """A job that a user submitted. A `queued` row is also its outbox entry; a `processing` row also holds its lease."""

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
        Index("ix_jobs_queued", "model", "lane", "created_at", "id", postgresql_where=text("state = 'queued'")),
        Index("ix_jobs_queued_owner", "owner_id", postgresql_where=text("state = 'queued'")),
        Index("ix_jobs_leases", "lease_until", postgresql_where=text("state = 'processing'")),
        Index("ix_jobs_finished", "finished_at", postgresql_where=text("finished_at is not null")),
        Index("ix_jobs_deadlines", "expires_at", postgresql_where=text("state = 'queued' and expires_at is not null")),
        # Covers all columns that counting the jobs of a bulk reads.
        Index("ix_jobs_bulk", "bulk_id", "state", "finished_at", postgresql_where=text("bulk_id is not null")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"))
    kind: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="queued")
    lane: Mapped[int] = mapped_column(SmallInteger)
    model: Mapped[str]
    images: Mapped[int] = mapped_column(Integer)
    quota_day: Mapped[date | None]  # the day whose quota its images count towards; None: no quota
    job_metadata: Mapped[dict[str, str]] = mapped_column("metadata", server_default="{}")
    webhook: Mapped[dict[str, Any] | None]
    retry_of: Mapped[UUID | None]  # no foreign key: the retried job may be deleted
    replay_of: Mapped[UUID | None]  # no foreign key: the replayed output may be deleted
    bulk_id: Mapped[UUID | None] = mapped_column(ForeignKey("bulks.id", ondelete="SET NULL"))
    bulk_line: Mapped[int | None] = mapped_column(Integer)
    resolution: Mapped[dict[str, Any] | None]
    safety: Mapped[dict[str, Any] | None]  # decisions of the content policy; None without a policy
    timings: Mapped[dict[str, float]] = mapped_column(server_default="{}")
    trace_context: Mapped[dict[str, str] | None] = mapped_column(JSONB(none_as_null=True))  # see `shared.tracing`

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


class ReferenceImage(Base):
    """A picture that the request of a job brought as a reference. It is in no collection, and goes with the job."""

    __tablename__ = "reference_images"
    __table_args__ = (UniqueConstraint("job_id", "position"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    position: Mapped[int] = mapped_column(Integer)
    sha256: Mapped[str] = mapped_column(index=True)
    blob_key: Mapped[str]
    thumbnail_key: Mapped[str]
    format: Mapped[str]
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    size_bytes: Mapped[int] = mapped_column(BigInteger)


class Bulk(Base):
    """Many generation requests sent as one stream of lines. Its items become jobs step by step: `bulks.top_up`."""

    __tablename__ = "bulks"
    __table_args__ = (
        CheckConstraint(
            "state in ('receiving', 'running', 'paused', 'completed', 'canceled', 'refused', 'abandoned')", name="state"
        ),
        CheckConstraint("(state in ('receiving', 'running', 'paused')) = (finished_at is null)", name="finished"),
        Index(None, "owner_id", text("created_at desc"), text("id desc")),
        Index("ix_bulks_open", "state", "owner_id", postgresql_where=text("finished_at is null")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"))
    name: Mapped[str | None]
    state: Mapped[str] = mapped_column(server_default="receiving")
    lane: Mapped[int] = mapped_column(SmallInteger)
    on_invalid: Mapped[str]
    defaults: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    webhook: Mapped[dict[str, Any] | None]
    bulk_metadata: Mapped[dict[str, str]] = mapped_column("metadata", server_default="{}")
    models: Mapped[list[str]] = mapped_column(server_default="{}")  # models that its items name
    announced: Mapped[int] = mapped_column(Integer, server_default=text("0"))  # items that the sender announced
    expires_in_s: Mapped[float | None]
    trace_context: Mapped[dict[str, str] | None] = mapped_column(JSONB(none_as_null=True))  # of the first request

    received_lines: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    digest: Mapped[bytes] = mapped_column(server_default=text("''::bytea"))
    total: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    invalid: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    images: Mapped[int] = mapped_column(Integer, server_default=text("0"))  # of all items together
    quota_day: Mapped[date | None]  # the `quota_day` of its jobs
    fed: Mapped[int] = mapped_column(Integer, server_default=text("0"))  # items that have become jobs

    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]  # no item becomes a job after this time
    retry_before: Mapped[datetime | None]  # an item whose job failed before this time gets a new job
    finished_at: Mapped[datetime | None]


class BulkItem(HasParameters, Base):
    """One valid line of a bulk, resolved like a job. `job_id` is set when the item becomes a job."""

    __tablename__ = "bulk_items"
    __table_args__ = (
        Index(
            "uq_bulk_items_custom_id",
            "bulk_id",
            "custom_id",
            unique=True,
            postgresql_where=text("custom_id is not null"),
        ),
        Index("ix_bulk_items_waiting", "bulk_id", "model", "line", postgresql_where=text("job_id is null")),
    )

    bulk_id: Mapped[UUID] = mapped_column(ForeignKey("bulks.id", ondelete="CASCADE"), primary_key=True)
    line: Mapped[int] = mapped_column(Integer, primary_key=True)
    custom_id: Mapped[str | None]
    kind: Mapped[str]
    model: Mapped[str]
    images: Mapped[int] = mapped_column(Integer)
    item_metadata: Mapped[dict[str, str]] = mapped_column("metadata", server_default="{}")
    timeout_s: Mapped[float]
    job_id: Mapped[UUID | None]  # no foreign key: if the job is deleted, the item must not get a new one
    retry_of: Mapped[UUID | None]


class BulkLineError(Base):
    """An invalid line of a bulk, with the reason."""

    __tablename__ = "bulk_line_errors"

    bulk_id: Mapped[UUID] = mapped_column(ForeignKey("bulks.id", ondelete="CASCADE"), primary_key=True)
    line: Mapped[int] = mapped_column(Integer, primary_key=True)
    custom_id: Mapped[str | None]
    code: Mapped[str]
    detail: Mapped[str]
    errors: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default="[]")


class IdempotencyKey(Base):
    """The stored answer of an `Idempotency-Key`. It has no foreign key, because it outlives the job."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index(None, "created_at"),)

    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"), primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    answer: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class JobEvent(Base):
    """An event of a job. The events of a job are numbered from 1 without gaps."""

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "at"),)

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    type: Mapped[str]
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    data: Mapped[dict[str, Any]] = mapped_column(server_default="{}")


class WebhookSecret(Base):
    """A secret that signs an owner's webhooks. After a rotation the old secret signs too, until it expires."""

    __tablename__ = "webhook_secrets"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"), index=True)
    secret: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]


class WebhookDelivery(Base):
    """One event to deliver to one receiver. It is added in the same transaction as the event."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("state in ('pending', 'delivered', 'failed')", name="state"),
        ForeignKeyConstraint(["job_id", "seq"], ["job_events.job_id", "job_events.seq"], ondelete="CASCADE"),
        UniqueConstraint("job_id", "seq"),
        CheckConstraint("(job_id is null) = (body is not null)", name="body"),
        Index(None, "owner_id", text("created_at desc"), text("id desc")),
        Index("ix_webhook_deliveries_due", "due_at", postgresql_where=text("state = 'pending'")),
        Index("ix_webhook_deliveries_settled", "created_at", postgresql_where=text("state <> 'pending'")),
        Index("ix_webhook_deliveries_leases", "host", "lease_until", postgresql_where=text("lease_until is not null")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("owners.id", ondelete="CASCADE"))
    job_id: Mapped[UUID | None]
    seq: Mapped[int | None] = mapped_column(BigInteger)
    body: Mapped[dict[str, Any] | None]  # the body to send, when no job's event is delivered
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


class Output(Base):
    """One image that a job generated."""

    __tablename__ = "generations"
    __table_args__ = (
        UniqueConstraint("job_id", "index"),
        Index(None, "owner_id", text("created_at desc"), text("id desc")),
        Index(None, "created_at"),
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
    sha256: Mapped[str] = mapped_column(index=True)
    pixels_sha256: Mapped[str]
    provenance: Mapped[dict[str, Any]]
    replay: Mapped[dict[str, Any] | None]  # for a replay: the comparison with the original output
    favourite: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class OutputReference(Base):
    """A reference that conditioned an output. It outlives the image, so it has no foreign key to `images`.

    Of the kind `request`, `image_id` is the id of a row of `reference_images`.
    """

    __tablename__ = "generation_references"

    generation_id: Mapped[UUID] = mapped_column(ForeignKey("generations.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    kind: Mapped[str] = mapped_column(server_default="corpus")
    image_id: Mapped[UUID] = mapped_column(index=True)
    sha256: Mapped[str]
    similarity: Mapped[float | None]
    weight: Mapped[float]
    pinned: Mapped[bool] = mapped_column(Boolean)
    caption: Mapped[str | None]


class WithdrawnImage(Base):
    """An image that was withdrawn: every output that drew from it is withdrawn too. Neither comes back.

    `cause_id` is the image that was named in the withdrawal; for that image itself, its own id.
    """

    __tablename__ = "withdrawn_images"

    image_id: Mapped[UUID] = mapped_column(primary_key=True)
    cause_id: Mapped[UUID]
    reason: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class DerivedImage(Base):
    """An image that is a remembered output, and an image from which this output drew. It outlives all three."""

    __tablename__ = "derived_images"

    image_id: Mapped[UUID] = mapped_column(primary_key=True)
    source_id: Mapped[UUID] = mapped_column(primary_key=True, index=True)


class AuditEvent(Base):
    """One act of a person or program that others may have to account for. A trigger refuses changes of a row."""

    __tablename__ = "audit_events"
    __table_args__ = (
        CheckConstraint("actor in ('caller', 'operator')", name="actor"),
        Index("ix_audit_events_newest", text("created_at desc"), text("id desc")),
        Index("ix_audit_events_subject", "subject_id", text("created_at desc"), text("id desc")),
        Index("ix_audit_events_action", "action", text("created_at desc"), text("id desc")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    actor: Mapped[str]
    owner_id: Mapped[UUID | None]  # no foreign key: the row outlives its owner and its subject
    key_prefix: Mapped[str | None]
    action: Mapped[str]
    subject_kind: Mapped[str]
    subject_id: Mapped[str]
    details: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    request_id: Mapped[str | None]


class BlobClaim(Base):
    """Blobs that an upload will name in rows: the sweeper keeps them. The claim ends in the commit of these rows."""

    __tablename__ = "blob_claims"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    keys: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class PeriodicTask(Base):
    """When a periodic task last started, in any process."""

    __tablename__ = "chores"

    name: Mapped[str] = mapped_column(primary_key=True)
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Worker(Base):
    """A worker process. It is live while it renews `heartbeat_at`."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    model: Mapped[str | None]
    state: Mapped[str]  # `loading`, `ready`, or `standby` while its embedding space is not the active one
    space: Mapped[str | None]  # digest of the embedding space of its CLIP
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ModelRecord(Base):
    """The capabilities of a generator, published by the last worker that loaded it."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    capabilities: Mapped[dict[str, Any]]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
