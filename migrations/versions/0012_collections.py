"""collections"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The previous release neither reads nor writes these columns. It knows no grants, so it refuses their collections.
    # It does not know the limits of a key either: create such keys after the upgrade.
    op.add_column("collections", sa.Column("description", sa.Text(), nullable=True))
    op.add_column(
        "collections",
        sa.Column("defaults", postgresql.JSONB(astext_type=sa.Text()), server_default="{}", nullable=False),
    )
    op.add_column("collections", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "ix_collections_deleting", "collections", ["deleted_at"], postgresql_where=sa.text("deleted_at is not null")
    )
    op.add_column("api_keys", sa.Column("collection_ids", postgresql.ARRAY(sa.Uuid()), nullable=True))
    op.create_table(
        "collection_grants",
        sa.Column("collection_id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("access", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("access in ('read', 'write')", name=op.f("ck_collection_grants_access")),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], name=op.f("fk_collection_grants_collection_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["owner_id"], ["owners.id"], name=op.f("fk_collection_grants_owner_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("collection_id", "owner_id", name=op.f("pk_collection_grants")),
    )
    op.create_index(op.f("ix_collection_grants_owner_id"), "collection_grants", ["owner_id"])


def downgrade() -> None:
    op.drop_table("collection_grants")
    op.drop_column("api_keys", "collection_ids")
    op.drop_index("ix_collections_deleting", "collections")
    op.drop_column("collections", "deleted_at")
    op.drop_column("collections", "defaults")
    op.drop_column("collections", "description")
