"""retries in turn"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("bulks", sa.Column("retry_before", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("bulks", "retry_before")
