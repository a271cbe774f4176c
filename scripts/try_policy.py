"""Print how the configured content policy scores prompts and images, to choose its thresholds.

    python -m scripts.try_policy --prompts prompts.txt --images folder/of/pictures

prompts.txt has one prompt per line. For each concept the script prints the similarities, highest first, and the
action of the policy. It loads the CLIP of the settings and needs neither database nor service.
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
from shared.vectors import l2_normalised
from worker_service.models.clip import Clip
from worker_service.models.content_policy import Policy, parts_of_image, parts_of_prompt
from worker_service.models.embedder import encode

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="file with one prompt per line")
    parser.add_argument("--images", type=Path, help="folder of PNG, JPEG and WebP files")
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

    policy = Policy.of(settings.safety, GeneratorSettings(kind="fake"), embed, has_checker=False)
    prompt_vectors = {text: l2_normalised(embed(parts_of_prompt(text))) for text in _lines(prompts)}
    image_vectors = {
        file.name: l2_normalised(embed(parts_of_image(np.asarray(open_image(file.read_bytes())))))
        for file in _files(images)
    }
    for concept in policy.concepts:
        name, prompt_rule, output_rule = concept.settings.name, concept.settings.prompt, concept.settings.output
        for stage, rule, vectors_by_item in (
            ("prompt", prompt_rule, prompt_vectors),
            ("output", output_rule, image_vectors),
        ):
            if rule is not None and vectors_by_item:
                scores = {item: concept.similarity(vectors) for item, vectors in vectors_by_item.items()}
                _print_scores(f"{name}, {stage}: {rule.action} from {rule.threshold:g}", scores, rule, top=top)


def _lines(file: Path | None) -> list[str]:
    return [] if file is None else [line.strip() for line in file.read_text().splitlines() if line.strip()]


def _files(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _print_scores(title: str, scores: Mapping[str, float], rule: PromptRule | OutputRule, *, top: int) -> None:
    table = Table("similarity", "action", "", title=title, title_justify="left")
    for item, score in sorted(scores.items(), key=lambda pair: -pair[1])[:top]:
        table.add_row(f"{score:.3f}", rule.action if score >= rule.threshold else "", escape(item))
    Console().print(table)


if __name__ == "__main__":
    main()
