"""favourites, and outputs by the digest of their file"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The previous release neither reads nor writes the column. A constant default changes no row. It records no sources
    # of the pictures of requests: while their jobs and outputs exist, withdrawals find these by the digest.
    op.add_column(
        "generations",
        sa.Column("favourite", sa.Boolean(), server_default=sa.false(), nullable=False),
        if_not_exists=True,
    )
    with op.get_context().autocommit_block():
        # An interrupted upgrade may leave a part.
        op.execute("drop index concurrently if exists ix_generations_sha256")
        # It waits for every open transaction, and blocks no reader and no writer.
        op.execute("set lock_timeout = '10min'")
        op.create_index(op.f("ix_generations_sha256"), "generations", ["sha256"], postgresql_concurrently=True)
        op.execute("reset lock_timeout")


def downgrade() -> None:
    op.drop_index(op.f("ix_generations_sha256"), "generations")
    op.drop_column("generations", "favourite")
