"""Full-text search in captions and tags, by Postgres.

The column `images.words` holds the stemmed words of an image, those of the caption with weight A and those of the tags
with weight B. A trigger fills it. The language belongs to the database, so that both sides always use the same one.
"""

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    CTE,
    Boolean,
    ColumnElement,
    Float,
    Integer,
    Row,
    Select,
    Text,
    Uuid,
    and_,
    cast,
    column,
    func,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import TSQUERY
from sqlalchemy.orm import Session
from sqlalchemy.sql.selectable import TextualSelect

from shared.contracts.search import FoundBy, ImageFilter
from shared.db import images
from shared.db.count_cache import get_count_cache
from shared.db.images import IMAGES, ScoredImage, Vector
from shared.db.spaces import Space
from shared.db.tables import Image
from shared.errors import ConfigurationError

MAX_WORDS = 8
"""Words of a query that count: the first ones."""
COMMON_ABOVE = 200
"""A word that more images have does not select images. So a search reads a bounded number of rows."""
COMMON_ABOVE_ALONE = 1000
"""The same for a search by words alone."""
TAG_SHARE = 0.6
"""The weight of a word that only the tags have, compared with a word of the caption. Two of them exceed one word."""
WEAK_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve dozen several many few some pair couple "
    "1 2 3 4 5 6 7 8 9 10 11 12 photo photograph picture image drawing illustration "
    "landscape scenery scene view panorama portrait background"
)
"""Words that count things, or name a medium or a kind of picture. They are ignored beside other words: `two dogs` is
not about `two`, and a city has nothing of a `winter landscape`."""
CAPTIONS_READ = 200
"""Captions in which a name is looked for. A name that is common stands alone in one of them."""
SAMPLED_FROM_WORDS = 4
"""From so many words on, common words are counted together in a sample. For eight words, each in an eighth of 50,000
captions, this takes a quarter of the time of eight counts. For two or three words it is slower."""
PAGE = 1000


@dataclass(frozen=True)
class Match:
    """An image whose caption or tags match a text.

    rank: its place among all matches, from 1. similarity: cosine to the vector of the query; NaN without one.
    word_share: part of the query's words that it has, by weight, in [0, 1]; words that no image has count too.
    scored: the image itself; `None`: it is one of `beside`.
    """

    image_id: UUID
    rank: int
    similarity: float
    word_share: float
    scored: ScoredImage | None = None


@dataclass(frozen=True)
class Matches:
    """exact: every image that has one of the words was compared.

    known_share: part of the words, by weight, that some image has, in [0, 1].
    with_a_word: those of `beside` that have at least one of the words.
    """

    found: list[Match]
    exact: bool
    known_share: float = 0.0
    with_a_word: frozenset[UUID] = frozenset()


def matching_images(
    session: Session,
    space: Space,
    content: str,
    vector: Vector | None,
    *,
    k: int,
    collection_id: UUID,
    where: ImageFilter,
    without: Sequence[str] = (),
    beside: Collection[UUID] = (),
    alone: bool = False,
    with_vectors: bool = True,
) -> Matches:
    """The `k` searchable images whose caption or tags match `content` best, and the matches among `beside`.

    An image scores the sum of the weights of its words. The weight of a word is `ln(1 + n / m)` for `m` images that
    have it: the inverse document frequency (Spärck Jones, Journal of Documentation 1972). A word that only the tags
    have counts less. Of equal scores, captions without further words come first. Then similarity decides, or without a
    vector `ts_rank_cd`.

    Args:
        vector: shape (space.dim,), float32, L2-normalised; `None`: similarities are NaN.
        without: texts; an image that has all words of one of them does not match.
        beside: images that the caller has, and that need not be loaded.
        alone: an image with any word matches. Otherwise it needs half of the best score.
        with_vectors: False: the images come without their vectors, which is quicker.
    """
    words = _words_of(session, content)
    if not words:
        return Matches([], exact=True)
    conditions = images.passing(collection_id, where)
    for unwanted in without:
        if excluded := _words_of(session, unwanted):
            conditions.append(~IMAGES.c.words.bool_op("@@")(cast(_all_of(excluded), TSQUERY)))
    searchable = _searchable(conditions)
    most = COMMON_ABOVE_ALONE if alone else COMMON_ABOVE
    counts = _counts_of(session, words, searchable, most=most, scope=(collection_id, where.model_dump_json(), *without))
    present = [word for word in words if counts[word]]
    if not present:
        return Matches([], exact=True)
    rare = list(_rarest(counts, most=most))
    parameters: dict[str, Any] = {
        "all": _all_of(present),
        "rare": _any_of(rare),
        "any": _any_of(present),
        "most": most,
        "beside": [str(image_id) for image_id in beside],
        "vector": None if vector is None else images.vector_text(vector),
        "k": k,
        "part": 0.0 if alone else 0.5,
    }
    weights = {word: math.log1p(most / max(1, counts[word])) for word in words}
    parameters["total"] = sum(weights.values())
    for number, word in enumerate(present):
        weight = weights[word]
        parameters |= {f"caption{number}": _literal(word, weights="A"), f"word{number}": _literal(word)}
        parameters |= {f"high{number}": weight, f"low{number}": weight * TAG_SHARE}
    selected = _Selected.RARE if counts[rare[0]] <= most else _Selected.SOME
    if selected is _Selected.RARE and len(rare) == len(present):
        selected = _Selected.ALL
    statement = _loading(space, len(present), selected, vector is not None, with_vectors)
    rows = session.execute(statement.add_cte(searchable), parameters).all()
    return Matches(
        [_match(row, with_vectors) for row in rows if row.matches],
        exact=selected is _Selected.ALL,
        known_share=sum(weights[word] for word in present) / parameters["total"],
        with_a_word=frozenset(row.id for row in rows if row.is_beside),
    )


class _Selected(Enum):
    """Which images with a word of the query are compared, beside those of `beside`."""

    ALL = auto()
    RARE = auto()
    """All that have a rare word. Images with all words are among them."""
    SOME = auto()
    """Some that have all words, and some that have the rarest one, because even this one is common."""


def find_name(session: Session, names: Sequence[str], *, collection_id: UUID, where: ImageFilter) -> str | None:
    """The first of the names that the caption of a searchable image has by itself.

    `machine` stands by itself in `machine` and in `a boy and the machine`, and not in `slot machine`. Before it and
    behind it stand only words that the language's search leaves out, such as articles.
    """
    searchable = _searchable(images.passing(collection_id, where))
    for name, phrase, first, length in _phrases_of(session, names):
        parameters = {"phrase": phrase, "first": first, "length": length, "most": CAPTIONS_READ}
        if session.scalar(_STANDS_ALONE.add_cte(searchable), parameters):
            return name
    return None


_STANDS_ALONE = text("""
    select exists (
        select from (select words from searchable where words @@ cast(:phrase as tsquery) limit :most) as found,
            unnest(ts_filter(words, '{a}')) as word, unnest(word.positions) as place
        where lexeme = :first and not exists (
            select from unnest(ts_filter(words, '{a}')) as other, unnest(other.positions) as beside
            where beside in (place - 1, place + :length)
        )
    ) as found
""").columns(column("found"))


def _phrases_of(session: Session, names: Sequence[str]) -> list[tuple[str, str, str, int]]:
    """For each name that has words: itself, the query for its words in a caption, its first word, and its length."""
    rows = session.execute(
        text("""
            select name, lexemes from unnest(cast(:names as text[])) with ordinality as names(name, number),
                lateral (
                    select array_agg(lexeme order by positions[1]) as lexemes from unnest(words_of(name))
                ) as of_name
            where lexemes is not null order by number
        """),
        {"names": list(names)},
    )
    return [
        (name, " <-> ".join(_literal(lexeme, weights="A") for lexeme in lexemes), lexemes[0], len(lexemes))
        for name, lexemes in rows
    ]


def _match(row: Row[*tuple[Any, ...]], with_vectors: bool) -> Match:
    image_id, rank, distance, share, _, is_beside, *columns = row
    similarity, word_share = math.nan if distance is None else 1 - distance, min(1.0, share)
    if is_beside:
        return Match(image_id, rank, similarity, word_share)
    image, vector, norm = images.read_found(columns, with_vectors)
    scored = ScoredImage(image, similarity, vector, norm, found_by=(FoundBy.TEXT,), word_share=word_share)
    return Match(image_id, rank, similarity, word_share, scored)


@cache
def _loading(
    space: Space, words: int, selected: _Selected, by_similarity: bool, with_vectors: bool
) -> Select[*tuple[Any, ...]]:
    """The statement that ranks images and loads those that the caller has not. One statement is quicker than two."""
    ranked = _ranking(space, words, selected, by_similarity=by_similarity).subquery("ranked")
    statement = select(ranked, *images.found_columns(space, with_vectors)).outerjoin(
        IMAGES, and_(IMAGES.c.id == ranked.c.id, ~ranked.c.is_beside)
    )
    if with_vectors:
        statement = statement.outerjoin(space.table, space.table.c.image_id == IMAGES.c.id)
    return statement.order_by(ranked.c.rank)


def _ranking(space: Space, words: int, selected: _Selected, *, by_similarity: bool) -> TextualSelect:
    """The statement that ranks images by `words` words. It is text, because building it takes longer than running it.

    It compares a bounded number of images: at most `most` by each condition, and `beside`.
    """
    numbers = range(words)
    score = " + ".join(
        f"case when words @@ cast(:caption{number} as tsquery) then cast(:high{number} as float8) "
        f"when words @@ cast(:word{number} as tsquery) then cast(:low{number} as float8) else 0 end"
        for number in numbers
    )
    in_caption = " + ".join(f"cast(words @@ cast(:caption{number} as tsquery) as int)" for number in numbers)
    equal = "distance" if by_similarity else "ts_rank_cd(words, cast(:any as tsquery), 1) desc"
    having = "select * from searchable where words @@ cast(:{} as tsquery) limit :most"
    near = """
        select * from (
            select * from searchable where id = any(cast(:beside as uuid[]))
            offset 0  -- so that the planner does not read all images that have the words
        ) as near
        where words @@ cast(:any as tsquery)
    """
    parts = {
        _Selected.ALL: [having.format("any")],
        _Selected.RARE: [having.format("rare"), near],
        _Selected.SOME: [having.format("all"), having.format("rare"), near],
    }[selected]
    compared = " union all ".join(f"({part})" for part in parts)
    statement = f"""
        select id, rank, distance, score / :total as share, score >= best * :part as matches, is_beside from (
            select id, distance, score, first_value(score) over ranking as best, row_number() over ranking as rank,
                id = any(cast(:beside as uuid[])) as is_beside
            from (
                select id, words, embedding <=> cast(cast(:vector as text) as halfvec) as distance, {score} as score,
                    length(ts_filter(words, '{{a}}')) > {in_caption} as has_further_words
                from (select distinct on (id) id, words from ({compared}) as selected) as compared
                join {space.table.name} as vectors on vectors.image_id = compared.id
            ) as scored
            window ranking as (order by score desc, has_further_words, {equal}, id)
        ) as ranked
        where is_beside or (rank <= :k and score >= best * :part)
    """
    return text(statement).columns(
        id=Uuid, rank=Integer, distance=Float, share=Float, matches=Boolean, is_beside=Boolean
    )


def _searchable(conditions: Sequence[ColumnElement[bool]]) -> CTE:
    searchable = select(IMAGES.c.id, IMAGES.c.words).where(*conditions).cte("searchable")
    return searchable.prefix_with("not materialized")  # so that each use of it can use the index


SPLITTING = text(
    """
    select lexeme, lexeme = any(tsvector_to_array(words_of(:weak))) as is_weak
    from unnest(words_of(:content)) order by positions[1], lexeme
    """
)


def _words_of(session: Session, content: str) -> list[str]:
    """The different stemmed words of a text, in its order. Weak words are left out beside others."""
    rows = session.execute(SPLITTING, {"content": content, "weak": WEAK_WORDS}).all()
    return [row[0] for row in rows if not row[1]][:MAX_WORDS] or [row[0] for row in rows][:MAX_WORDS]


def _counts_of(
    session: Session, words: Sequence[str], searchable: CTE, *, most: int, scope: Hashable
) -> dict[str, int]:
    """As `_count_images`. A word that was common in the same scope, a filter, is not counted again for a while."""
    known = get_count_cache()
    counts = {word: count for word in words if (count := known.find((scope, most, word))) is not None}
    if rest := [word for word in words if word not in counts]:
        counts |= _count_images(session, rest, searchable, most=most)
    for word in rest:
        if counts[word] > most:
            known.store((scope, most, word), counts[word])
    return {word: counts[word] for word in words}


def _count_images(session: Session, words: Sequence[str], searchable: CTE, *, most: int) -> dict[str, int]:
    """How many images have each word. The count ends above `most`: the word is common."""
    parameters: dict[str, Any] = {f"word{number}": _literal(word) for number, word in enumerate(words)}
    statement = _counting(len(words), sampled=len(words) >= SAMPLED_FROM_WORDS)
    parameters |= {"any": _any_of(words), "most": most, "sample": most * len(words)}
    row = session.execute(statement.add_cte(searchable), parameters).one()
    return dict(zip(words, row, strict=True))


@cache
def _counting(words: int, *, sampled: bool) -> TextualSelect:
    """The statement that counts the images of each word.

    sampled: one pass over some images that have a word counts all common words at once. Each other word then has a
    count of its own, which the database executes only where the sample has left it open.
    """
    numbers = range(words)
    found = "select from searchable where words @@ cast(:word{number} as tsquery) limit :most + 1"
    counts = [f"(select count(*) from ({found.format(number=number)}) as found)" for number in numbers]
    sample = ""
    if sampled:
        enough = "compared < :sample or sampled{number} > :most"
        counts = [
            f"case when {enough.format(number=number)} then least(sampled{number}, :most + 1) else {counts[number]} end"
            for number in numbers
        ]
        has_word = "count(*) filter (where words @@ cast(:word{number} as tsquery)) as sampled{number}"
        sample = f"""
            from (
                select count(*) as compared, {", ".join(has_word.format(number=number) for number in numbers)}
                from (
                    select words from searchable where words @@ cast(:any as tsquery) limit :sample
                ) as having_any
            ) as sample
        """
    statement = "select " + ", ".join(f"{counts[number]} as count{number}" for number in numbers) + sample
    return text(statement).columns(*(column(f"count{number}", Integer) for number in numbers))


def _rarest(counts: dict[str, int], *, most: int) -> Iterator[str]:
    """The words that select images: the rarest one, and further ones up to `most` images together."""
    total = 0
    for word in sorted((word for word in counts if counts[word]), key=lambda word: counts[word]):
        total += counts[word]
        if total > most and total > counts[word]:
            return
        yield word


def _all_of(words: Sequence[str]) -> str:
    return " & ".join(_literal(word) for word in words)


def _any_of(words: Sequence[str]) -> str:
    return " | ".join(_literal(word) for word in words)


def _literal(word: str, *, weights: str = "") -> str:
    """A stemmed word as Postgres's type `tsquery` reads it, whatever its characters."""
    escaped = word.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'" + (f":{weights}" if weights else "")


# --- the language -------------------------------------------------------------------------------------------------


def read_language(session: Session) -> str:
    """The text search configuration that the database uses for captions and tags."""
    return session.scalar(select(cast(func.image_text_language(), Text))) or ""


def set_language(session: Session, language: str) -> None:
    """Use another text search configuration from this commit on. The words of all images have to be filled again.

    language: lower-case letters, digits and `_`, as the setting `retrieval.text_language` checks it.

    Raises:
        ConfigurationError: the database has no such configuration.
    """
    if not language.isidentifier():
        raise ConfigurationError(f"{language!r} is not a name.")
    known = text("select 1 from pg_ts_config where cfgname = :language and pg_ts_config_is_visible(oid)")
    if session.scalar(known, {"language": language}) is None:
        raise ConfigurationError(f"The database has no text search configuration {language!r}.")
    session.execute(
        text(
            "create or replace function image_text_language() returns regconfig language sql stable "
            f"as $$ select '{language}'::regconfig $$"
        )
    )


def fill_words(session: Session, *, after: UUID) -> UUID | None:
    """Fill the words of the next images by id; return the id after which to continue, `None` at the end.

    Cached searches of these images' collections are not used any more.
    """
    page = select(Image.id).where(Image.id > after).order_by(Image.id).limit(PAGE).with_for_update(key_share=True)
    filled = (
        update(Image)
        .where(Image.id.in_(page))
        .values(words=func.image_words(Image.caption, Image.tags))
        .returning(Image.id, Image.collection_id)
        .execution_options(synchronize_session=False)
    )
    rows = session.execute(filled).all()
    for collection_id in sorted({row.collection_id for row in rows}):
        images.bump_collection_version(session, collection_id)
    return max(row.id for row in rows) if rows else None
