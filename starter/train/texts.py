"""Training captions that mix names, keywords, colours and styles, so that short and unusual prompts also work."""

import random
from collections.abc import Iterable

import torch
from torch import Tensor

from starter.data.corpus import Sample
from starter.data.packages import STYLES

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 45),
    "orange": (245, 135, 30),
    "yellow": (253, 205, 55),
    "green": (75, 160, 65),
    "blue": (40, 120, 215),
    "light blue": (135, 205, 240),
    "purple": (135, 80, 185),
    "pink": (245, 135, 175),
    "brown": (130, 85, 60),
    "grey": (140, 150, 155),
    "black": (45, 45, 45),
}
STYLE_PHRASES = {style.key: style.phrase for style in STYLES}
NAME_TEMPLATES = (
    "{}",
    "{}",
    "{}",
    "a {}",
    "the {}",
    "a picture of a {}",
    "a drawing of a {}",
    "{} icon",
    "{} emoji",
)


def main_colours(pixels: Tensor, *, share: float = 0.22) -> list[str]:
    """Return at most two colour names, largest area first; each covers at least `share` of the non-white pixels.

    Each pixel counts for the nearest of COLOURS in RGB distance, which suffices for flat drawings.

    pixels: uint8 (3, S, S).
    """
    flat = pixels.reshape(3, -1).T.float()
    drawn = flat[flat.min(dim=1).values < 235]
    if len(drawn) == 0:
        return ["white"]
    palette = torch.tensor(list(COLOURS.values())).float()
    counts = torch.bincount(torch.cdist(drawn, palette).argmin(dim=1), minlength=len(palette))
    order = counts.argsort(descending=True).tolist()
    names = list(COLOURS)
    return [names[index] for index in order if counts[index] >= share * len(drawn)][:2]


def random_caption(sample: Sample, colours: list[str], rng: random.Random) -> str:
    """Return a random caption: 35 % the name, 30 % name and keywords, 35 % keywords; half of all with a colour."""
    kind = rng.random()
    name = rng.choice(NAME_TEMPLATES).format(sample.caption)
    words = rng.sample(sample.tags, k=min(len(sample.tags), rng.randint(1, 4)))
    colour = rng.choice(colours) if colours and rng.random() < 0.5 else ""
    if kind < 0.35 or not words:
        text = name
    elif kind < 0.65:
        text = rng.choice((", ", " ", " with ")).join([name, *words])
    else:
        text = rng.choice((", ", " ")).join(words)
    if colour and colour not in text:
        text = f"{colour} {text}"
    if rng.random() < 0.15:
        text = f"{text}, {STYLE_PHRASES[sample.attributes['style']]}"
    return text


def nonsense_text(rng: random.Random) -> str:
    """Return one to four made-up words, which must not be near any image, so that a similarity threshold works."""
    words = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.3:
            words.append("".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=rng.randint(2, 8))))
        else:
            pairs = (rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
            words.append("".join(pairs) + rng.choice(("", "l", "n", "r", "s", "t", "tion", "ing", "ment", "x")))
    return " ".join(words)


def vocabulary_texts(samples: Iterable[Sample]) -> list[str]:
    """Return the texts from which the tokenizer learns its vocabulary."""
    texts: list[str] = [*COLOURS, *STYLE_PHRASES.values(), *(t.format("a") for t in NAME_TEMPLATES)]
    for sample in samples:
        texts += [sample.caption, *sample.tags, sample.attributes["group"], sample.attributes["subgroup"]]
    return texts
