"""`python -m starter.data`: download the packages, render every concept in every style, write the corpus file."""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from starter.data.concepts import Concept, held_out_keys, load_concepts
from starter.data.corpus import CORPUS_FILE, IMAGE_PX, Sample, to_webp, write_corpus
from starter.data.packages import KEYWORDS, NAMES, STYLES, unpacked
from starter.data.render import IconSet, render_on_white


def render(concepts: list[Concept], cache: Path) -> Iterator[Sample]:
    """Yield one sample for each concept and style that has a drawing of it, ordered by concept, then by style."""
    icon_sets = {style.key: IconSet.load(unpacked(style.package, cache)) for style in STYLES}
    slugs = icon_sets["noto"].slugs
    held_out = held_out_keys(concepts)
    for concept in tqdm(concepts, desc="render", unit="concept"):
        for style in STYLES:
            icons = icon_sets[style.key]
            slug = icons.slugs.get(concept.key) or slugs.get(concept.key)  # noto-v1 lists no code points
            svg = icons.find_svg(slug) if slug else None
            if svg is None:
                continue
            yield Sample(
                image=to_webp(render_on_white(svg, size=IMAGE_PX)),
                caption=concept.name,
                tags=concept.tags,
                licence=style.licence,
                source=style.source,
                attributes={
                    "concept": concept.name,
                    "style": style.key,
                    "split": "held-out" if concept.key in held_out else "train",
                    "group": concept.group_name,
                    "subgroup": concept.subgroup,
                    "author": style.author,
                },
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CORPUS_FILE)
    parser.add_argument("--cache", type=Path, default=Path("var/packages"), help="folder for npm tarballs")
    arguments = parser.parse_args()
    cache = arguments.cache.resolve()
    concepts = load_concepts(unpacked(NAMES, cache), unpacked(KEYWORDS, cache))
    count = write_corpus(render(concepts, cache), arguments.out)
    groups = Counter(concept.group_name for concept in concepts)
    print(f"{arguments.out}: {count} images of {len(concepts)} concepts {dict(groups)}")


if __name__ == "__main__":
    main()
