"""text search"""

from uuid import UUID

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from shared.settings import get_settings

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

PAGE = 1000


def upgrade() -> None:
    # The previous release does not know the column. The trigger fills it for the images that this release adds too.
    # Each step can run again, because the steps after the first commit are not in its transaction.
    language = get_settings().retrieval.text_language
    known = "select 1 from pg_ts_config where cfgname = :language and pg_ts_config_is_visible(oid)"
    if op.get_bind().scalar(sa.text(known), {"language": language}) is None:
        raise SystemExit(
            f"retrieval.text_language: the database has no text search configuration {language!r} "
            "(AFTERIMAGE_RETRIEVAL__TEXT_LANGUAGE)"
        )
    op.add_column("images", sa.Column("words", postgresql.TSVECTOR(), nullable=True), if_not_exists=True)
    op.execute(f"""
        create or replace function image_text_language() returns regconfig language sql stable
        as $$ select '{language}'::regconfig $$
    """)
    # Without these characters, Postgres takes `cat/dog` for a path, and `a cat.A dog` for a host.
    op.execute("""
        create or replace function words_of(content text) returns tsvector language sql stable
        as $$ select to_tsvector(image_text_language(), translate(content, './@:', '    ')) $$
    """)
    op.execute("""
        create or replace function image_words(caption text, tags text[]) returns tsvector language sql stable
        as $$
            select setweight(words_of(coalesce(caption, '')), 'A')
                || setweight(words_of(array_to_string(tags, ' ')), 'B')
        $$
    """)
    op.execute("""
        create or replace function fill_image_words() returns trigger language plpgsql
        as $$ begin new.words := image_words(new.caption, new.tags); return new; end $$
    """)
    op.execute("""
        create or replace trigger fill_image_words before insert or update of caption, tags on images
        for each row execute function fill_image_words()
    """)
    with op.get_context().autocommit_block():
        op.execute("drop index concurrently if exists ix_images_words")  # an interrupted upgrade may leave a part
        # It waits for every open transaction, and blocks no reader and no writer.
        op.execute("set lock_timeout = '10min'")
        op.create_index(
            op.f("ix_images_words"), "images", ["words"], postgresql_using="gin", postgresql_concurrently=True
        )
        op.execute("reset lock_timeout")
        _fill()


def _fill() -> None:
    """Fill the column of the images that are there, in pages, so that no lock lasts."""
    statement = sa.text("""
        with page as (
            select id from images where id > :after and words is null order by id limit :page for no key update
        )
        update images set words = image_words(images.caption, images.tags) from page
        where images.id = page.id returning images.id
    """)
    last = UUID(int=0)
    while ids := op.get_bind().scalars(statement, {"after": last, "page": PAGE}).all():
        last = max(ids)


def downgrade() -> None:
    op.execute("drop trigger fill_image_words on images")
    op.execute("drop function fill_image_words")
    op.drop_column("images", "words")
    op.execute("drop function image_words")
    op.execute("drop function words_of")
    op.execute("drop function image_text_language")
