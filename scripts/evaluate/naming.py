"""Make a sheet for a blind test: can a person who does not know the prompts name the generated images?

    python -m scripts.evaluate.naming --out out/eval

Generates 24 fixed concepts of the starter corpus, 15 seen and 9 held out, one seed each, with the references that the
service retrieves. Writes three files: naming.png has numbered images without captions. naming.txt has 48 names, half of
which are decoys. naming-key.json has the solution, which the viewer must not see.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from scripts.evaluate.arms import Arm, build_case, image_requests
from scripts.evaluate.corpus import read_corpus
from scripts.evaluate.store import Store
from shared.settings import STARTER, get_settings
from shared.vectors import l2_normalised
from worker_service.models.clip import Clip
from worker_service.models.generation.diffusion import Diffusion

CONCEPTS = (
    *("pizza", "red apple", "fox", "clown face", "soccer ball", "house", "rocket", "sunflower"),
    *("blue heart", "smiling face with sunglasses", "tiger face", "automobile", "guitar", "ice cream", "crown"),
    *("banana", "owl", "penguin", "watermelon", "robot", "duck", "broccoli", "popcorn", "flamingo"),
)
"""Chosen by name before any image was generated. The crown and the last eight are held out."""
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
    order = list(np.random.default_rng(1).permutation(np.array(CONCEPTS)))
    numbered_sheet(generate_images(order)).save(out / "naming.png")
    (out / "naming.txt").write_text("\n".join(sorted((*CONCEPTS, *DECOYS))) + "\n", encoding="utf-8")
    key = {str(number): str(concept) for number, concept in enumerate(order, start=1)}
    (out / "naming-key.json").write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")


def generate_images(concepts: list[str]) -> list[Image.Image]:
    """Generate one image of each concept, as the service does."""
    settings = get_settings()
    corpus = read_corpus(STARTER / "corpus.tar", limits=settings.api, threads=torch.get_num_threads())
    clip = Clip.load(settings.model)
    model = Diffusion.load(settings.model.default_generator, settings.model)
    names = corpus.concepts()
    batches = batched([image.open() for image in corpus.images], clip.max_batch_size)
    store = Store.of(corpus.images, np.concatenate([clip.encode_image(batch) for batch in batches]))
    queries = dict(zip(names, l2_normalised(clip.encode_text(names)), strict=True))
    k = min(settings.retrieval.default_k, model.capabilities.max_references)
    cases = [
        build_case(concept, store=store, queries=queries, k=k, seeds=1, settings=settings.retrieval)
        for concept in concepts
    ]
    requests = image_requests(cases, Arm.RETRIEVED, model=model, store=store)
    images = (
        model.generate(batch, lambda _step, _steps: True)
        for _, equal in groupby(requests, model.batch_key)
        for batch in batched(equal, model.capabilities.max_batch_size)
    )
    return [Image.fromarray(pixels) for batch in images for pixels in batch]


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def numbered_sheet(images: list[Image.Image]) -> Image.Image:
    """Place the images in rows, each with its number, from 1."""
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
