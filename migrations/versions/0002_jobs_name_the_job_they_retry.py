"""jobs name the job they retry"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("retry_of", sa.Uuid(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "retry_of")
