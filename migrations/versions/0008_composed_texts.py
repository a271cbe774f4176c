"""composed texts"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Filters compare these texts in Unicode's form NFC. The previous release stores them as they are sent. An image
    # that it adds beside this release is found by such a text only after the next change of the image.
    op.execute("""
        with composed as (
            update images set
                tags = coalesce(
                    (
                        select array_agg(normalize(tag, nfc) order by number)
                        from unnest(tags) with ordinality as each(tag, number)
                    ),
                    tags
                ),
                source = normalize(source, nfc),
                licence = normalize(licence, nfc),
                attributes = normalize(attributes::text, nfc)::jsonb
            where tags::text is not nfc normalized
                or source is not nfc normalized
                or licence is not nfc normalized
                or attributes::text is not nfc normalized
            returning collection_id
        )
        update collections set version = version + 1 where id in (select collection_id from composed)
    """)


def downgrade() -> None:
    """The previous release reads composed texts."""
