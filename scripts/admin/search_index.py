"""How searches use the index of vectors and the words of captions and tags."""

import argparse
import sys
from uuid import UUID

from rich.console import Console
from rich.table import Table
from sqlalchemy.orm import Session

from scripts.admin.records import Commands
from shared.contracts.search_tuning import IndexKind
from shared.db import search_tuning, spaces, text_search, vector_index
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import ResourceNotFoundError
from shared.settings import get_settings


def add_commands(commands: Commands) -> None:
    command = commands.add_parser(
        "tune-search", help="measure how many candidates a search must examine, and let searches examine so many"
    )
    command.add_argument("--space", metavar="DIGEST", help="default: the active space")
    command.add_argument(
        "--recall", type=float, default=0.98, help="wanted share of the true nearest images (default: %(default)s)"
    )
    command.add_argument("--queries", type=int, default=100, help="searches per value (default: %(default)s)")
    command.add_argument("--dry-run", action="store_true", help="only print what was measured")
    command.set_defaults(run=_tune_search)
    command = commands.add_parser(
        "rebuild-index", help="build the index of a space again, while the service runs; then run tune-search"
    )
    command.add_argument("--space", metavar="DIGEST", help="default: the active space")
    command.add_argument(
        "--kind",
        type=IndexKind,
        choices=list(IndexKind),
        default=IndexKind.HALFVEC,
        help="bit: signs only, a tenth of the size; the vectors then decide among the candidates",
    )
    command.add_argument("--m", type=int, default=16, help="neighbours per vector (default: %(default)s)")
    command.add_argument(
        "--ef-construction", type=int, default=128, help="candidates per insert (default: %(default)s)"
    )
    command.add_argument("--memory-mb", type=int, default=1024, help="memory of the build (default: %(default)s)")
    command.add_argument("--workers", type=int, default=2, help="parallel processes (default: %(default)s)")
    command.set_defaults(run=_rebuild_index)
    command = commands.add_parser(
        "set-text-language", help="search captions and tags in another language; reads the words of all images again"
    )
    command.add_argument("language", nargs="?", help="text search configuration; default: the setting's")
    command.set_defaults(run=_set_text_language)


def _tune_search(arguments: argparse.Namespace) -> None:
    if not 0.5 <= arguments.recall <= 1 or arguments.queries < 2:
        raise ValueError("--recall must be in [0.5, 1], and --queries at least 2")
    with session_scope() as session:
        space = _named_space(session, arguments.space)
        tuning = search_tuning.measure(
            session,
            space,
            target=arguments.recall,
            queries=arguments.queries,
            on_progress=lambda found: print(f"{found.k} images: measured", file=sys.stderr),
        )
        if not arguments.dry_run:
            search_tuning.store(session, space, tuning)
    table = Table("images", "filter", "candidates", "recall", "median ms")
    for each in tuning.searches:
        table.add_row(str(each.k), "no", str(each.ef_search), f"{each.recall_all:.3f}", f"{each.median_ms:.1f}")
        figures = str(each.ef_search_filtered), f"{each.recall_filtered:.3f}", f"{each.median_ms_filtered:.1f}"
        table.add_row(str(each.k), "yes", *figures)
    Console().print(table)
    if short := [str(each.k) for each in tuning.searches if each.recall < tuning.target]:
        print(
            f"No value reaches a recall of {tuning.target:g} for {', '.join(short)} images. "
            "An index with a larger --m finds more: see rebuild-index.",
            file=sys.stderr,
        )


def _rebuild_index(arguments: argparse.Namespace) -> None:
    if not (2 <= arguments.m <= 100 and 2 * arguments.m <= arguments.ef_construction <= 1000):
        raise ValueError("--m must be in [2, 100], and --ef-construction at least twice --m and at most 1000")
    with session_scope() as session:
        space = _named_space(session, arguments.space)
    vector_index.rebuild(
        get_settings().database,
        space,
        kind=arguments.kind,
        m=arguments.m,
        ef_construction=arguments.ef_construction,
        memory_mb=arguments.memory_mb,
        parallel_workers=arguments.workers,
    )


def _named_space(session: Session, digest: str | None) -> Space:
    space = spaces.find_active(session) if digest is None else spaces.get(session, digest)
    if space is None:
        raise ResourceNotFoundError("There is no embedding space yet: an embed worker adds the first one.")
    return space


def _set_text_language(arguments: argparse.Namespace) -> None:
    """Each page of images is a transaction of its own. The command may be run again after an interruption."""
    language = arguments.language or get_settings().retrieval.text_language
    with session_scope() as session:
        text_search.set_language(session, language)
    after: UUID | None = UUID(int=0)
    while after is not None:
        with session_scope() as session:
            after = text_search.fill_words(session, after=after)
    print(f"captions and tags are searched in {language}")
