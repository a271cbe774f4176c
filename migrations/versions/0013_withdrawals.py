"""withdrawals"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The previous release neither reads nor writes these tables. It still shows withdrawn outputs, and its sweeper
    # keeps their files, until it is replaced.
    op.create_table(
        "audit_events",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=True),
        sa.Column("key_prefix", sa.Text(), nullable=True),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject_kind", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("details", postgresql.JSONB(), server_default="{}", nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.CheckConstraint("actor in ('caller', 'operator')", name=op.f("ck_audit_events_actor")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
    )
    newest_first = [sa.text("created_at desc"), sa.text("id desc")]
    op.create_index("ix_audit_events_newest", "audit_events", newest_first)
    op.create_index("ix_audit_events_subject", "audit_events", ["subject_id", *newest_first])
    op.create_index("ix_audit_events_action", "audit_events", ["action", *newest_first])
    op.execute("""
        create function refuse_change_of_audit() returns trigger language plpgsql as $$
        begin
            raise exception 'rows of audit_events are never changed or deleted';
        end
        $$
    """)
    op.execute("""
        create trigger append_only before update or delete or truncate on audit_events
        for each statement execute function refuse_change_of_audit()
    """)

    op.create_table(
        "withdrawn_images",
        sa.Column("image_id", sa.Uuid(), nullable=False),
        sa.Column("cause_id", sa.Uuid(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("image_id", name=op.f("pk_withdrawn_images")),
    )
    op.create_table(
        "derived_images",
        sa.Column("image_id", sa.Uuid(), nullable=False),
        sa.Column("source_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("image_id", "source_id", name=op.f("pk_derived_images")),
    )
    op.create_index(op.f("ix_derived_images_source_id"), "derived_images", ["source_id"])
    # Images that were remembered before. Each names its output in an attribute, which people can change.
    op.execute("""
        with remembered as materialized (
            select id, (attributes ->> 'generation_id')::uuid as generation_id from images
            where attributes ->> 'generation_id' ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
        )
        insert into derived_images (image_id, source_id)
        select distinct remembered.id, reference.image_id
        from remembered join generation_references reference using (generation_id)
        where reference.kind = 'corpus'
    """)


def downgrade() -> None:
    op.drop_table("derived_images")
    op.drop_table("withdrawn_images")
    op.drop_table("audit_events")
    op.execute("drop function refuse_change_of_audit()")
