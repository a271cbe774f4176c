"""job operations"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Fencing and crash counts for images, as for jobs.
    op.add_column("images", sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("images", sa.Column("crashes", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("images", sa.Column("model_started", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_index(
        "ix_images_leases",
        "images",
        ["lease_until"],
        unique=False,
        postgresql_where=sa.text("state = 'pending' and lease_until is not null"),
    )
    # The blob sweeper.
    op.create_index(op.f("ix_images_sha256"), "images", ["sha256"], unique=False)
    op.create_table(
        "blob_claims",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("keys", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_blob_claims")),
    )
    # Retention.
    op.create_table(
        "chores",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_chores")),
    )
    op.create_index(
        "ix_jobs_finished", "jobs", ["finished_at"], unique=False, postgresql_where=sa.text("finished_at is not null")
    )
    op.create_index(op.f("ix_job_events_at"), "job_events", ["at"], unique=False)
    op.create_index(op.f("ix_generations_created_at"), "generations", ["created_at"], unique=False)
    op.create_index(
        "ix_webhook_deliveries_settled",
        "webhook_deliveries",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("state <> 'pending'"),
    )
    # Queue positions.
    op.create_index(
        "ix_jobs_queued",
        "jobs",
        ["model", "lane", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'queued'"),
    )
    # Limits and quotas of owners.
    op.create_index(
        "ix_jobs_queued_owner", "jobs", ["owner_id"], unique=False, postgresql_where=sa.text("state = 'queued'")
    )
    op.add_column("jobs", sa.Column("quota_day", sa.Date(), nullable=True))
    op.add_column("owners", sa.Column("daily_images", sa.Integer(), nullable=True))
    op.create_table(
        "image_usage",
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("images", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["owner_id"], ["owners.id"], name=op.f("fk_image_usage_owner_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("owner_id", "day", name=op.f("pk_image_usage")),
    )
    # Lists of webhook deliveries.
    op.create_index(
        op.f("ix_webhook_deliveries_owner_id"),
        "webhook_deliveries",
        ["owner_id", sa.literal_column("created_at desc"), sa.literal_column("id desc")],
        unique=False,
    )


def downgrade() -> None:
    op.drop_index(op.f("ix_webhook_deliveries_owner_id"), table_name="webhook_deliveries")
    op.drop_table("image_usage")
    op.drop_column("owners", "daily_images")
    op.drop_column("jobs", "quota_day")
    op.drop_index("ix_jobs_queued_owner", table_name="jobs", postgresql_where=sa.text("state = 'queued'"))
    op.drop_index("ix_jobs_queued", table_name="jobs", postgresql_where=sa.text("state = 'queued'"))
    op.drop_index(
        "ix_webhook_deliveries_settled", table_name="webhook_deliveries", postgresql_where=sa.text("state <> 'pending'")
    )
    op.drop_index(op.f("ix_generations_created_at"), table_name="generations")
    op.drop_index(op.f("ix_job_events_at"), table_name="job_events")
    op.drop_index("ix_jobs_finished", table_name="jobs", postgresql_where=sa.text("finished_at is not null"))
    op.drop_table("chores")
    op.drop_table("blob_claims")
    op.drop_index(op.f("ix_images_sha256"), table_name="images")
    op.drop_index(
        "ix_images_leases",
        table_name="images",
        postgresql_where=sa.text("state = 'pending' and lease_until is not null"),
    )
    op.drop_column("images", "model_started")
    op.drop_column("images", "crashes")
    op.drop_column("images", "attempt")
