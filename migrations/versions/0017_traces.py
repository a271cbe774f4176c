"""traces"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The previous release neither reads nor writes the columns. A nullable column without a default changes no row.
    op.add_column("jobs", sa.Column("trace_context", postgresql.JSONB(), nullable=True))
    op.add_column("bulks", sa.Column("trace_context", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("bulks", "trace_context")
    op.drop_column("jobs", "trace_context")
