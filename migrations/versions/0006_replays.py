"""replays"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The previous release neither reads nor writes these columns: its workers run a replay without the comparison.
    op.add_column("jobs", sa.Column("replay_of", sa.Uuid(), nullable=True))
    op.add_column("generations", sa.Column("replay", postgresql.JSONB(astext_type=sa.Text()), nullable=True))


def downgrade() -> None:
    op.drop_column("generations", "replay")
    op.drop_column("jobs", "replay_of")
