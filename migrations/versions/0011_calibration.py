"""calibration"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The previous release does not know the column, and adds spaces without a calibration.
    op.add_column("embedding_spaces", sa.Column("calibration", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("embedding_spaces", "calibration")
