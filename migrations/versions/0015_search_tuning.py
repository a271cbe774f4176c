"""search tuning"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The previous release searches the index of kind `halfvec`. With the other kind its searches compare every vector.
    op.add_column("embedding_spaces", sa.Column("index_kind", sa.Text(), server_default="halfvec", nullable=False))
    op.add_column("embedding_spaces", sa.Column("search_tuning", JSONB(none_as_null=True), nullable=True))
    # Parameters that a worker of the previous release refuses. It neither reads nor writes these columns.
    for table in ("jobs", "bulk_items"):
        op.add_column(table, sa.Column("new_parameters", JSONB(none_as_null=True), nullable=True))


def downgrade() -> None:
    for table in ("bulk_items", "jobs"):
        op.drop_column(table, "new_parameters")
    op.drop_column("embedding_spaces", "search_tuning")
    op.drop_column("embedding_spaces", "index_kind")
