"""Training captions that mix names, keywords, colours and styles, so that short and unusual prompts also work."""

import random
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from starter.data.concepts import listed
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

SENTENCES = listed(
    """
    {} | {} | {} | this is {} | draw {} | a photo of {} | an image of {} | a painting of {} | show me {} | an icon of {}
    | {} and nothing else | please draw me {} | a cartoon of {} | there is {} | I want {} | an illustration of {}
    | a nice picture with {} | {} on its own | can I have {} | {} please
    """
)
SUBJECTS = ("a picture of {}", "a drawing of {}", "an image for {}", "{}, please", "I think of {}", "a symbol for {}")
"""Sentences around a scene or a feeling, which has no plural."""

COUNTS = listed(
    """
    {} | {} | {} | two {} | two {} | three {} | four {} | five {} | ten {} | some {} | many {} | several {} | a few {}
    | a pair of {} | a couple of {} | a group of {} | lots of {} | the {} | both {} | 2 {} | 3 {}
    """
)
ADJECTIVES = listed(
    "big|small|little|tiny|huge|cute|lovely|nice|beautiful|pretty|new|funny|simple|typical|real|old|young|shiny|single|"
    "standing|sitting|running|jumping|waiting|clean|dirty|strange|famous|fresh|broken|colourful"
)
"""They say nothing about which thing it is."""

PLACES = listed(
    """
    on the beach | in the snow | under a tree | at night | in the forest | in the garden | on the table | by the
    sea | in the sky | in the rain | in the city | on the moon | in the park | on a hill | at sunset | in the
    kitchen | in front of a house | on a street | in the mountains | by the window | in the desert | under water
    | on the grass | in a box | on a chair | in the morning | outside | at home | in my hand | next to a house |
    behind a fence | in the sun | in the summer | in winter | on a white background
    """
)
IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice", "goose": "geese",
    "tooth": "teeth", "foot": "feet", "ox": "oxen", "leaf": "leaves", "knife": "knives", "wolf": "wolves",
    "scarf": "scarves", "loaf": "loaves", "shelf": "shelves", "elf": "elves", "calf": "calves", "die": "dice",
    "snowman": "snowmen", "fireman": "firemen", "policeman": "policemen", "tomato": "tomatoes", "potato": "potatoes",
    "mango": "mangoes", "hero": "heroes", "cactus": "cacti", "sheep": "sheep", "fish": "fish", "deer": "deer",
    "shrimp": "shrimp", "bison": "bison", "moose": "moose", "squid": "squid", "aircraft": "aircraft", "bus": "buses",
    "octopus": "octopuses", "walrus": "walruses", "compass": "compasses", "dress": "dresses", "glass": "glasses",
    "volcano": "volcanoes", "buffalo": "buffaloes", "ladybug": "ladybugs", "half": "halves", "wife": "wives",
}  # fmt: skip


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


def phrase(noun: str, rng: random.Random) -> str:
    """Return a thing's name with an article, an adjective, a number, a sentence, a place, or some of these."""
    choice = rng.random()
    if choice < 0.2:
        text = noun
    elif choice < 0.4:
        text = rng.choice(SENTENCES).format(with_article(noun))
    elif choice < 0.8:
        text = rng.choice(COUNTS).format(plural(noun))
    else:
        text = with_article(f"{rng.choice(ADJECTIVES)} {noun}")
    if rng.random() < 0.2:
        text = f"{text} {rng.choice(PLACES)}"
    return text


def with_article(noun: str) -> str:
    """Return the noun with "a" or "an"; a plural comes back as it is."""
    if is_plural(noun):
        return noun
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    """Return the plural of a name in English: `slices of pizza` for `slice of pizza`."""
    found = re.match(r"(.+?)( (?:of|with|in|on|and|at|from|for|without|behind) .+)", noun)
    head, rest = found.groups() if found else (noun, "")
    return _plural_word(head) + rest


def is_plural(noun: str) -> bool:
    return noun in IRREGULAR.values() or (noun.endswith("s") and not noun.endswith(("ss", "us", "is", "as", "os")))


def _plural_word(head: str) -> str:
    words = head.split(" ")
    last = words[-1]
    lower = last.lower()
    if is_plural(lower):
        many = last
    elif lower in IRREGULAR:
        many = IRREGULAR[lower]
    elif re.search("(s|x|z|ch|sh)$", lower):
        many = f"{last}es"
    elif re.search("[^aeiou]y$", lower):
        many = f"{last[:-1]}ies"
    else:
        many = f"{last}s"
    return " ".join([*words[:-1], many])


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
