"""A sheet for a person: can someone who does not know the prompts name what was drawn?

    python -m scripts.evaluate.naming --out out/eval

Draws 24 fixed concepts of the starter corpus, 15 seen and 9 held out, one seed each, with the references that the
service retrieves. Writes naming.png (numbered, without captions), naming.txt (48 names to choose from, half of them
drawn nowhere) and naming-key.json (who is who: not for the viewer).
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from scripts.evaluate import corpus
from scripts.evaluate.arms import Arm, case, requests
from scripts.evaluate.judging import unit
from scripts.evaluate.store import Store
from shared.settings import STARTER, get_settings
from worker_service.models.clip import Clip
from worker_service.models.diffusion import Diffusion

DRAWN = (
    *("pizza", "red apple", "fox", "clown face", "soccer ball", "house", "rocket", "sunflower"),
    *("blue heart", "smiling face with sunglasses", "tiger face", "automobile", "guitar", "ice cream", "crown"),
    *("banana", "owl", "penguin", "watermelon", "robot", "duck", "broccoli", "popcorn", "flamingo"),
)
"""Chosen by name before anything was drawn. The crown and the last eight are held out."""
DECOYS = (
    *("hamburger", "tangerine", "horse", "sad but relieved face", "basketball", "castle", "airplane", "tulip"),
    *("green heart", "sleeping face", "lion", "bicycle", "violin", "birthday cake", "top hat", "pear", "eagle"),
    *("turtle", "strawberry", "alien", "snail", "carrot", "french fries", "shark"),
)
COLUMNS, CELL_PX, GAP_PX = 6, 160, 24
Item = TypeVar("Item")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/eval"), help="folder to write to (default: %(default)s)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    order = list(np.random.default_rng(1).permutation(np.array(DRAWN)))
    numbered(draw(order)).save(out / "naming.png")
    (out / "naming.txt").write_text("\n".join(sorted((*DRAWN, *DECOYS))) + "\n", encoding="utf-8")
    key = {str(number): str(concept) for number, concept in enumerate(order, start=1)}
    (out / "naming-key.json").write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")


def draw(concepts: list[str]) -> list[Image.Image]:
    """One image of each, as the service draws them."""
    settings = get_settings()
    given = corpus.read(STARTER / "corpus.tar", limits=settings.api, threads=torch.get_num_threads())
    clip = Clip.load(settings.model)
    model = Diffusion.load(settings.model.default_generator, settings.model)
    names = given.concepts()
    batches = batched([picture.open() for picture in given.pictures], clip.max_batch_size)
    store = Store.of(given.pictures, np.concatenate([clip.encode_image(batch) for batch in batches]))
    queries = dict(zip(names, unit(clip.encode_text(names)), strict=True))
    k = min(settings.retrieval.default_k, model.capabilities.max_references)
    cases = [
        case(concept, store=store, queries=queries, k=k, seeds=1, settings=settings.retrieval) for concept in concepts
    ]
    asked = requests(cases, Arm.RETRIEVED, model=model, store=store)
    images = (
        model.generate(batch, lambda _step, _steps: True) for batch in batched(asked, model.capabilities.max_batch_size)
    )
    return [Image.fromarray(pixels) for batch in images for pixels in batch]


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def numbered(images: list[Image.Image]) -> Image.Image:
    """The images in rows, each with its number, from 1."""
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (CELL_PX + GAP_PX), rows * (CELL_PX + GAP_PX)), "white")
    text, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for index, image in enumerate(images):
        left, top = index % COLUMNS * (CELL_PX + GAP_PX), index // COLUMNS * (CELL_PX + GAP_PX)
        text.text((left + 2, top + 2), str(index + 1), fill="black", font=font)
        sheet.paste(image.resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS), (left + GAP_PX // 2, top + GAP_PX))
    return sheet


if __name__ == "__main__":
    main()
