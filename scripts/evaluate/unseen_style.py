"""Drawings that no model here was trained on and that the corpus does not hold: Twemoji.

Twemoji is by Twitter and contributors under CC-BY-4.0, https://github.com/jdecked/twemoji. It is fetched when an
evaluation wants it and is no part of what is shipped.
"""

import re
import subprocess
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from starter.data.corpus import IMAGE_PX
from starter.data.packages import Package, unpacked
from starter.data.render import IconSet, render_on_white

NAME = "Twemoji"
TWEMOJI = Package("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7")
FETCH_TIMEOUT_S = 120


class UnseenStyleUnavailableError(Exception):
    """The package is not in the cache and cannot be fetched."""


def drawings(concepts: Iterable[str], *, cache: Path) -> dict[str, Image.Image]:
    """Those of the concepts that Twemoji draws under this name, rendered as the starter corpus is.

    Raises:
        UnseenStyleUnavailableError
        ValueError: the package has another digest than the pinned one.
    """
    icons = IconSet.load(fetched(cache))
    found = {concept: icons.find_svg(slug(concept)) for concept in concepts}
    return {concept: render_on_white(svg, size=IMAGE_PX) for concept, svg in found.items() if svg is not None}


def fetched(cache: Path) -> Path:
    """The unpacked package, from `cache` or from the registry that npm is configured for."""
    if not (cache / TWEMOJI.tarball).exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Without its retries npm knows within a second that there is no network, instead of within a minute.
        command = ["npm", "pack", "--silent", "--fetch-retries=0", f"{TWEMOJI.name}@{TWEMOJI.version}"]
        try:
            subprocess.run(command, cwd=cache, check=True, capture_output=True, timeout=FETCH_TIMEOUT_S)
        except FileNotFoundError as error:
            raise UnseenStyleUnavailableError(f"npm, which fetches {TWEMOJI.name}, is not installed") from error
        except subprocess.SubprocessError as error:
            raise UnseenStyleUnavailableError(f"npm could not fetch {TWEMOJI.name}; is there a network?") from error
    return unpacked(TWEMOJI, cache)


def slug(name: str) -> str:
    """The name of a drawing of that concept: "piñata" is `pinata`, "Santa Claus" is `santa-claus`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
