"""The words of everyday queries: what WordNet says about the things of the corpus, and scenes written by hand."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starter.data.themes import THEMES, Theme
from starter.data.words import WORDS_FILE, Words


@dataclass(frozen=True)
class Vocabulary:
    """How people speak about the corpus, and about what it does not have.

    absent, abstract: words for visible things, and for others, that fit no image.
    """

    words: Sequence[Words]
    themes: Sequence[Theme]
    absent: Sequence[str]
    abstract: Sequence[str]


def load_vocabulary(path: Path = WORDS_FILE, themes: Sequence[Theme] = THEMES) -> Vocabulary:
    """Load the file of `python -m starter.data.words`, without absent words that a theme or a thing has."""
    *entries, rest = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    words = [Words(each["relation"], tuple(each["words"]), tuple(each["things"]), each["gloss"]) for each in entries]
    present = {word for theme in themes for text in theme.phrases for word in text.lower().split()}
    present |= {word for each in words for word in each.words}
    absent, abstract = (
        [word for word in rest[key] if present.isdisjoint((word, word.split()[-1]))] for key in ("absent", "abstract")
    )
    return Vocabulary(words, themes, absent, abstract)
