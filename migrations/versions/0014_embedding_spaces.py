"""embedding spaces"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The previous release leaves all of this to its defaults. A worker row without a space is one of its workers.
    op.add_column("workers", sa.Column("space", sa.Text(), nullable=True))
    op.add_column("embedding_spaces", sa.Column("added", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("embedding_spaces", sa.Column("adding_since", sa.DateTime(timezone=True), nullable=True))
    op.add_column("embedding_spaces", sa.Column("last_added_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "space_attempts",
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("image_id", sa.Uuid(), nullable=False),
        sa.Column("crashes", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["space_id"], ["embedding_spaces.id"], name=op.f("fk_space_attempts_space_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["image_id"], ["images.id"], name=op.f("fk_space_attempts_image_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("space_id", "image_id", name=op.f("pk_space_attempts")),
    )
    op.create_index(op.f("ix_space_attempts_image_id"), "space_attempts", ["image_id"])


def downgrade() -> None:
    op.drop_table("space_attempts")
    op.drop_column("embedding_spaces", "last_added_at")
    op.drop_column("embedding_spaces", "adding_since")
    op.drop_column("embedding_spaces", "added")
    op.drop_column("workers", "space")
