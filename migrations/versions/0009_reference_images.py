"""reference images"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The previous release neither reads nor writes this table, and its sweeper does not list the blobs. Its workers
    # cannot read a job with such pictures. They return it to the queue, for a worker of this release.
    op.create_table(
        "reference_images",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("blob_key", sa.Text(), nullable=False),
        sa.Column("thumbnail_key", sa.Text(), nullable=False),
        sa.Column("format", sa.Text(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_reference_images_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reference_images")),
        sa.UniqueConstraint("job_id", "position", name=op.f("uq_reference_images_job_id_position")),
    )
    op.create_index(op.f("ix_reference_images_sha256"), "reference_images", ["sha256"])
    # The previous release stores references of the corpus only, and leaves the column to its default.
    op.add_column("generation_references", sa.Column("kind", sa.Text(), server_default="corpus", nullable=False))


def downgrade() -> None:
    op.drop_column("generation_references", "kind")
    op.drop_table("reference_images")
