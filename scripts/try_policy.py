"""What the content policy of the settings sees in prompts and pictures: for choosing its thresholds.

    python -m scripts.try_policy --prompts prompts.txt --images folder/of/pictures

prompts.txt holds a prompt a line. For each concept it prints how similar they are, the nearest first, and what would
follow. It loads the CLIP of the settings and needs neither database nor service.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shared.errors import ConfigurationError, InvalidImageError, ModelLoadError
from shared.imaging import open_image
from shared.settings import GeneratorSettings, OutputRule, PromptRule, get_settings
from worker_service.models.clip import Clip
from worker_service.models.content_policy import Policy, parts_of_image, parts_of_prompt, unit
from worker_service.models.embedder import encode

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="a file with a prompt a line")
    parser.add_argument("--images", type=Path, help="a folder of PNG, JPEG and WebP files")
    parser.add_argument("--top", type=int, default=20, help="rows per concept (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        _run(arguments.prompts, arguments.images, top=arguments.top)
    except (ConfigurationError, ModelLoadError, InvalidImageError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


def _run(prompts: Path | None, images: Path | None, *, top: int) -> None:
    settings = get_settings()
    if not settings.safety.concepts:
        raise ConfigurationError("safety.concepts is empty: there is no policy to try.")
    clip = Clip.load(settings.model)

    def embed(items: Sequence[str] | Sequence[Image.Image]) -> np.ndarray:
        return np.stack(encode(clip, items))

    policy = Policy.of(settings.safety, GeneratorSettings(kind="cheap"), embed, has_checker=False)
    seen_in_prompts = {text: unit(embed(parts_of_prompt(text))) for text in _lines(prompts)}
    seen_in_images = {
        file.name: unit(embed(parts_of_image(np.asarray(open_image(file.read_bytes()))))) for file in _files(images)
    }
    for concept in policy.concepts:
        name, of_prompts, of_images = concept.settings.name, concept.settings.prompt, concept.settings.output
        for stage, rule, seen in (("prompt", of_prompts, seen_in_prompts), ("output", of_images, seen_in_images)):
            if rule is not None and seen:
                scores = {item: concept.similarity(vectors) for item, vectors in seen.items()}
                _show(f"{name}, {stage}: {rule.action} from {rule.threshold:g}", scores, rule, top=top)


def _lines(file: Path | None) -> list[str]:
    return [] if file is None else [line.strip() for line in file.read_text().splitlines() if line.strip()]


def _files(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _show(title: str, scores: Mapping[str, float], rule: PromptRule | OutputRule, *, top: int) -> None:
    table = Table("similarity", "follows", "", title=title, title_justify="left")
    for item, score in sorted(scores.items(), key=lambda pair: -pair[1])[:top]:
        table.add_row(f"{score:.3f}", rule.action if score >= rule.threshold else "", escape(item))
    Console().print(table)


if __name__ == "__main__":
    main()
