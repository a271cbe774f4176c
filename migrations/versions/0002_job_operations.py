"""job operations"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # An image's work is fenced and its crashes are counted, as a job's are.
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
    # Sweeping blobs.
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
    # Places in the queue.
    op.create_index(
        "ix_jobs_queued",
        "jobs",
        ["model", "lane", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'queued'"),
    )


def downgrade() -> None:
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
