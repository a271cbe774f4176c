"""Drawings in a style that is neither in the corpus nor in the training data: Twemoji.

Twemoji is by Twitter and contributors under CC-BY-4.0: https://github.com/jdecked/twemoji. An evaluation downloads it
when it is used. The repository does not contain it.
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
    """The package is not in the cache and cannot be downloaded."""


def render_concepts(concepts: Iterable[str], *, cache: Path) -> dict[str, Image.Image]:
    """Render the concepts that Twemoji has under this name, in the way of the starter corpus.

    Raises:
        UnseenStyleUnavailableError: the package is not in the cache and cannot be downloaded.
        ValueError: the package has another digest than the pinned one.
    """
    icons = IconSet.load(fetch_package(cache))
    found = {concept: icons.find_svg(slug(concept)) for concept in concepts}
    return {concept: render_on_white(svg, size=IMAGE_PX) for concept, svg in found.items() if svg is not None}


def fetch_package(cache: Path) -> Path:
    """Return the unpacked package, from `cache` or from npm's configured registry."""
    if not (cache / TWEMOJI.tarball).exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Without retries npm fails within a second instead of a minute if the network is missing.
        command = ["npm", "pack", "--silent", "--fetch-retries=0", f"{TWEMOJI.name}@{TWEMOJI.version}"]
        try:
            subprocess.run(command, cwd=cache, check=True, capture_output=True, timeout=FETCH_TIMEOUT_S)
        except FileNotFoundError as error:
            raise UnseenStyleUnavailableError(f"npm, which downloads {TWEMOJI.name}, is not installed") from error
        except subprocess.SubprocessError as error:
            raise UnseenStyleUnavailableError(f"npm could not download {TWEMOJI.name}; check the network") from error
    return unpacked(TWEMOJI, cache)


def slug(name: str) -> str:
    """Return the icon name of a concept: "piñata" gives `pinata`, "Santa Claus" gives `santa-claus`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
