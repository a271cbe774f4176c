"""bulks"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "bulks",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("state", sa.Text(), server_default="receiving", nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("on_invalid", sa.Text(), nullable=False),
        sa.Column("defaults", postgresql.JSONB(astext_type=sa.Text()), server_default="{}", nullable=False),
        sa.Column("webhook", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), server_default="{}", nullable=False),
        sa.Column("models", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("announced", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("expires_in_s", sa.Double(), nullable=True),
        sa.Column("received_lines", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("digest", sa.LargeBinary(), server_default=sa.text("''::bytea"), nullable=False),
        sa.Column("total", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("invalid", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("images", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("quota_day", sa.Date(), nullable=True),
        sa.Column("fed", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state in ('receiving', 'running', 'paused', 'completed', 'canceled', 'refused', 'abandoned')",
            name=op.f("ck_bulks_state"),
        ),
        sa.CheckConstraint(
            "(state in ('receiving', 'running', 'paused')) = (finished_at is null)", name=op.f("ck_bulks_finished")
        ),
        sa.ForeignKeyConstraint(["owner_id"], ["owners.id"], name=op.f("fk_bulks_owner_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bulks")),
    )
    op.create_index(
        op.f("ix_bulks_owner_id"),
        "bulks",
        ["owner_id", sa.literal_column("created_at desc"), sa.literal_column("id desc")],
        unique=False,
    )
    op.create_index(
        "ix_bulks_open", "bulks", ["state", "owner_id"], unique=False, postgresql_where=sa.text("finished_at is null")
    )
    op.create_table(
        "bulk_items",
        sa.Column("bulk_id", sa.Uuid(), nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("images", sa.Integer(), nullable=False),
        sa.Column("parameters", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), server_default="{}", nullable=False),
        sa.Column("timeout_s", sa.Double(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("retry_of", sa.Uuid(), nullable=True),
        sa.ForeignKeyConstraint(["bulk_id"], ["bulks.id"], name=op.f("fk_bulk_items_bulk_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("bulk_id", "line", name=op.f("pk_bulk_items")),
    )
    op.create_index(
        "uq_bulk_items_custom_id",
        "bulk_items",
        ["bulk_id", "custom_id"],
        unique=True,
        postgresql_where=sa.text("custom_id is not null"),
    )
    op.create_index(
        "ix_bulk_items_waiting",
        "bulk_items",
        ["bulk_id", "model", "line"],
        unique=False,
        postgresql_where=sa.text("job_id is null"),
    )
    op.create_table(
        "bulk_line_errors",
        sa.Column("bulk_id", sa.Uuid(), nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=True),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("errors", postgresql.JSONB(astext_type=sa.Text()), server_default="[]", nullable=False),
        sa.ForeignKeyConstraint(
            ["bulk_id"], ["bulks.id"], name=op.f("fk_bulk_line_errors_bulk_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("bulk_id", "line", name=op.f("pk_bulk_line_errors")),
    )
    op.add_column("jobs", sa.Column("bulk_id", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("bulk_line", sa.Integer(), nullable=True))
    op.create_foreign_key(op.f("fk_jobs_bulk_id"), "jobs", "bulks", ["bulk_id"], ["id"], ondelete="SET NULL")
    op.create_index(
        "ix_jobs_bulk",
        "jobs",
        ["bulk_id", "state", "finished_at"],
        unique=False,
        postgresql_where=sa.text("bulk_id is not null"),
    )
    # A delivery refers to an event of a job, or has its own body.
    op.alter_column("webhook_deliveries", "job_id", existing_type=sa.Uuid(), nullable=True)
    op.alter_column("webhook_deliveries", "seq", existing_type=sa.BigInteger(), nullable=True)
    op.add_column("webhook_deliveries", sa.Column("body", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.create_check_constraint(
        op.f("ck_webhook_deliveries_body"), "webhook_deliveries", "(job_id is null) = (body is not null)"
    )


def downgrade() -> None:
    op.drop_constraint(op.f("ck_webhook_deliveries_body"), "webhook_deliveries", type_="check")
    op.execute("delete from webhook_deliveries where job_id is null")
    op.drop_column("webhook_deliveries", "body")
    op.alter_column("webhook_deliveries", "seq", existing_type=sa.BigInteger(), nullable=False)
    op.alter_column("webhook_deliveries", "job_id", existing_type=sa.Uuid(), nullable=False)
    op.drop_index("ix_jobs_bulk", table_name="jobs", postgresql_where=sa.text("bulk_id is not null"))
    op.drop_constraint(op.f("fk_jobs_bulk_id"), "jobs", type_="foreignkey")
    op.drop_column("jobs", "bulk_line")
    op.drop_column("jobs", "bulk_id")
    op.drop_table("bulk_line_errors")
    op.drop_table("bulk_items")
    op.drop_table("bulks")
