"""Training scenes: one to four things from the corpus on a background, with a caption and the references to draw from.

A thing is drawn as large as its reference, on the grid of 16 pixels that the generator's tokens form. The i-th place
of a scene shows the i-th reference. So most of drawing is copying tokens, which a small model learns. The exceptions
teach the rest: other colours, other drawings of the same concept, and the same reference for several things.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from PIL import Image

from starter.data.corpus import IMAGE_PX, Sample
from starter.train.backgrounds import LANDSCAPES, PLACES, TIMES, WEATHERS, draw_background, draw_stage
from starter.train.cutouts import HUES, coloured_share, cut_out, recoloured
from starter.train.texts import COLOURS, is_plural, nonsense_text, plural, with_article

FULL_SIDE = IMAGE_PX
HALF_SIDE = IMAGE_PX // 2
COLOURABLE_SHARE = 0.35
SAME_DRAWING = 0.85
"""Probability that the drawn image is its reference. Otherwise it is another drawing of the same concept."""
ONE_CONCEPT_SHARE = 0.25
"""Share of the scenes with references at half side that show one concept, once or several times."""
COUNTED_AMONG_SHARE = 0.15
"""Share of the scenes of two concepts that show one of them twice."""
COLOUR_SHARE = 0.5
"""Share of the things that can be recoloured whose caption names another colour than their reference has."""

UNKNOWN_SHARE = 0.6
"""Share of the scenes without references whose caption names things, which are not drawn."""
NEUTRAL_TINT = (150, 170, 190)
"""Tint of the empty place of a caption without a colour."""

SURROUNDINGS_SHARE = 0.1
"""Share of the scenes whose references also show the place, the time or the weather that the caption names."""
SURROUNDINGS = {
    "snow": "cloud with snow|snowflake|snowman",
    "beach": "beach with umbrella|desert island|water wave",
    "water": "water wave",
    "mountains": "mountain|snow-capped mountain|sunrise over mountains|mount fuji",
    "city": "cityscape|cityscape at dusk|night with stars",
    "desert": "desert",
    "forest": "evergreen tree|deciduous tree|national park",
    "night": "night with stars|crescent moon|waxing crescent moon|milky way",
    "sunset": "sunrise|sunrise over mountains|cityscape at dusk",
    "rain": "cloud with rain|sun behind rain cloud|umbrella with rain drops",
    "snowfall": "cloud with snow|snowflake",
}
"""Things that a search finds for the words of a place, a time or a weather."""

COMMON_PLACES = frozenset({"grass", "mountains"})
"""Grounds that a caption with a time or a weather need not name."""

Place = tuple[int, int]
"""Left and top of a square in pixels."""

HATS = frozenset({"crown", "woman's hat", "top hat", "graduation cap", "billed cap", "military helmet"})
RELATIONS: dict[str, tuple[tuple[str, ...], Place, Place]] = {
    "beside": (("and", "and", "and", "next to", "beside", "near", "by"), (0, 32), (64, 32)),
    "worn": (("wearing", "in"), (32, 48), (32, 0)),
    "held": (("holding", "with", "with", "carrying", "playing with"), (16, 16), (64, 64)),
    "over": (("over", "above"), (32, 0), (32, 64)),
    "under": (("under", "below"), (32, 64), (32, 0)),
    "on": (("on", "on top of", "sitting on"), (32, 16), (32, 64)),
}
"""Words of each relation, and the places of the first and of the second thing."""
RELATION_SHARES = (40, 14, 26, 6, 7, 7)
ROWS: dict[int, tuple[Place, ...]] = {
    1: ((32, 32),),
    2: ((0, 32), (64, 32)),
    3: ((0, 64), (64, 64), (32, 0)),
    4: ((0, 64), (64, 64), (0, 0), (64, 0)),
}
"""Places of things of equal rank, by their number."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
ARTICLES = ("the", "some", "one", "")
LOOKS = ("little", "big", "old", "new", "nice", "cute", "happy", "beautiful", "simple", "funny", "small")
"""Adjectives that change nothing in the picture, so that the generator does not depend on known words alone."""
UNCOUNTABLE = frozenset(
    {"bread", "butter", "salt", "bacon", "money", "grass", "broccoli", "garlic", "fire", "ice", "spaghetti"}
)
OPENINGS = ("{}",) * 8 + ("a picture of {}", "a drawing of {}", "an image of {}", "an icon of {}")


@dataclass(frozen=True)
class Reference:
    """A corpus image that conditions the scene. image: its index. side: the pixels at which the generator reads it."""

    image: int
    side: int


@dataclass(frozen=True)
class Scene:
    """One training example. picture: RGB, IMAGE_PX square. references: as the service orders them.

    The service takes one reference for each concept in the order of the caption, then the next one for each.
    """

    caption: str
    picture: Image.Image
    references: tuple[Reference, ...]


@dataclass(frozen=True)
class Thing:
    """A concept with the indices of the images to draw and of its references, and the words for it."""

    drawn: tuple[int, ...]
    references: tuple[int, ...]
    noun: str
    colour: str = ""
    look: str = ""
    article: str | None = None

    def singular(self) -> str:
        words = " ".join(word for word in (self.look, self.colour, self.noun) if word)
        if self.article is not None:
            return f"{self.article} {words}".strip()
        if self.noun in UNCOUNTABLE or is_plural(self.noun):
            return words
        return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"

    def counted(self, number: int) -> str:
        return " ".join(word for word in (NUMBERS[number], self.look, self.colour, plural(self.noun)) if word)


class SceneMaker:
    """Makes random scenes from the corpus images that are held out of the training, or from those that are not."""

    def __init__(self, samples: list[Sample], *, held_out: bool = False) -> None:
        self.samples = samples
        self.images_of: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            if sample.is_held_out == held_out:
                self.images_of.setdefault(sample.concept, []).append(index)
        self.concepts = list(self.images_of)
        self.hats = [concept for concept in self.concepts if concept in HATS] or self.concepts
        self.held = [concept for concept in self.concepts if self._group(concept) in ("objects", "food", "activities")]
        known = {
            key: [name for name in names.split("|") if name in self.images_of] for key, names in SURROUNDINGS.items()
        }
        self.surroundings = {key: names for key, names in known.items() if names}
        self._drawings: dict[tuple[int, int], Image.Image] = {}

    def scene(self, rng: random.Random, *, references: int, side: int) -> Scene:
        """Return a scene with exactly `references` references of `side` pixels.

        Without references it shows a landscape, or an empty place instead of the things that the caption names. With
        FULL_SIDE it shows one thing. With HALF_SIDE it shows two or three concepts, or a number of things of one.
        """
        place, time, weather = self._surroundings(rng)
        if references == 0:
            return self._without_references(place, time, weather, rng)
        if self.surroundings and (side == FULL_SIDE or references > 1) and rng.random() < SURROUNDINGS_SHARE:
            return self._with_shown_surroundings(references, side, rng)
        picture = draw_background(place, time, weather, rng)
        if side == FULL_SIDE or references == 1 or rng.random() < ONE_CONCEPT_SHARE:
            number = 1 if side == FULL_SIDE else rng.choice((1, 1, 1, 2, 2, 2, 3, 3, 4))
            thing = self._thing(rng, references=references, number=number)
            places = ((0, 0),) if side == FULL_SIDE else ROWS[number]
            for image, where in zip(thing.drawn, places, strict=True):
                self._paste(picture, image, where, side, thing.colour)
            text, things = thing.singular() if number == 1 else thing.counted(number), [thing]
        else:
            text, things = self._several(picture, references, rng)
        used = _in_turns([thing.references for thing in things], side)
        return self._finished(_with_surroundings(text, place, time, weather, rng), picture, used, rng)

    def _with_shown_surroundings(self, references: int, side: int, rng: random.Random) -> Scene:
        """Return a scene with references to its surroundings, which are the background and no things.

        With FULL_SIDE no reference shows the thing of the caption, so the place stays empty.
        """
        key = rng.choice(list(self.surroundings))
        place = key if key in PLACES else rng.choice(sorted(COMMON_PLACES))
        time, weather = (key if key in TIMES else "day"), (key if key in WEATHERS else "clear")
        words = rng.choice((PLACES | TIMES | WEATHERS)[key])
        share = references if side == FULL_SIDE else references // 2
        shown = self._thing(rng, references=share, number=1, among=self.surroundings[key])
        picture = draw_background(place, time, weather, rng)
        if side == FULL_SIDE:
            text, of_things = self._unknown("", rng), [shown.references]
        else:
            thing = self._thing(rng, references=references - share, number=1)
            where = RELATIONS["over"][1] if words.startswith("over") else ROWS[1][0]
            self._paste(picture, thing.drawn[0], where, side, thing.colour)
            text, of_things = thing.singular(), [thing.references, shown.references]
        return self._finished(f"{text} {words}", picture, _in_turns(of_things, side), rng)

    def _without_references(self, place: str, time: str, weather: str, rng: random.Random) -> Scene:
        """Return a landscape, or an empty place for a caption that names things: a wrong thing would be worse."""
        if rng.random() < UNKNOWN_SHARE:
            colour = rng.choice(list(COLOURS)) if rng.random() < COLOUR_SHARE else ""
            text = self._unknown(colour, rng)
            stage = draw_stage(COLOURS.get(colour, NEUTRAL_TINT))
            picture = stage if place == "white" else draw_background(place, time, weather, rng)
            return self._finished(_with_surroundings(text, place, time, weather, rng), picture, (), rng)
        if place not in LANDSCAPES:
            place = rng.choice(list(LANDSCAPES))
        text = _with_surroundings(rng.choice(LANDSCAPES[place]), "white", time, weather, rng)
        return self._finished(text, draw_background(place, time, weather, rng), (), rng)

    def _unknown(self, colour: str, rng: random.Random) -> str:
        """Return the name of a thing of the corpus, or made-up words; for one in five, of two things."""
        noun = self._noun(rng.choice(self.concepts), rng) if rng.random() < 0.6 else nonsense_text(rng)
        look = rng.choice(LOOKS) if rng.random() < 0.15 else ""
        article = rng.choice(ARTICLES) if rng.random() < 0.15 else None
        thing = Thing(drawn=(), references=(), noun=noun, colour=colour, look=look, article=article)
        text = thing.counted(rng.choice(list(NUMBERS))) if rng.random() < 0.15 else thing.singular()
        if rng.random() < 0.2:
            other = self._noun(rng.choice(self.concepts), rng)
            text = f"{text} {rng.choice(RELATIONS[rng.choice(list(RELATIONS))][0])} {with_article(other)}"
        return text

    def _several(self, picture: Image.Image, references: int, rng: random.Random) -> tuple[str, list[Thing]]:
        if references >= 3 and rng.random() < 0.4:
            things = [self._thing(rng, references=share, number=1) for share in _shares(references, 3)]
            for thing, where in zip(things, ROWS[3], strict=True):
                self._paste(picture, thing.drawn[0], where, HALF_SIDE, thing.colour)
            names = [thing.singular() for thing in things]
            return f"{names[0]}, {names[1]} and {names[2]}", things
        if rng.random() < COUNTED_AMONG_SHARE:
            return self._with_a_pair(picture, references, rng)
        relation = rng.choices(list(RELATIONS), RELATION_SHARES)[0]
        words, *places = RELATIONS[relation]
        among = {"worn": self.hats, "held": self.held}.get(relation)
        shares = _shares(references, 2)
        first = self._thing(rng, references=shares[0], number=1)
        second = self._thing(rng, references=shares[1], number=1, among=among)
        for thing, where in zip((first, second), places, strict=True):
            self._paste(picture, thing.drawn[0], where, HALF_SIDE, thing.colour)
        return f"{first.singular()} {rng.choice(words)} {second.singular()}", [first, second]

    def _with_a_pair(self, picture: Image.Image, references: int, rng: random.Random) -> tuple[str, list[Thing]]:
        """Draw two things, one of them twice. The second drawing comes last, as the further references do."""
        pair = rng.randrange(2)
        things = [
            self._thing(rng, references=share, number=2 if index == pair else 1)
            for index, share in enumerate(_shares(references, 2))
        ]
        drawn = [(thing.drawn[0], thing.colour) for thing in things] + [(things[pair].drawn[1], things[pair].colour)]
        for (image, colour), where in zip(drawn, ROWS[3], strict=True):
            self._paste(picture, image, where, HALF_SIDE, colour)
        names = [thing.counted(2) if index == pair else thing.singular() for index, thing in enumerate(things)]
        return f"{names[0]} {rng.choice(('and', 'and', 'and', 'with', 'next to'))} {names[1]}", things

    def _thing(self, rng: random.Random, *, references: int, number: int, among: list[str] | None = None) -> Thing:
        """Return a random thing that is drawn `number` times. The i-th drawing shows the i-th reference, in turn."""
        concept = rng.choice(among or self.concepts)
        images = rng.sample(self.images_of[concept], len(self.images_of[concept]))
        used = tuple((images * references)[:references])
        drawn = used or (images[0],)
        if references == 1 and rng.random() > SAME_DRAWING:
            drawn = (images[-1],)
        drawn = tuple((drawn * number)[:number])
        colour, look, article = "", "", None
        if rng.random() < COLOUR_SHARE and coloured_share(self._drawing(drawn[0], HALF_SIDE)) > COLOURABLE_SHARE:
            colour = rng.choice(list(HUES))
        if rng.random() < 0.15:
            look = rng.choice(LOOKS)
        if rng.random() < 0.15:
            article = rng.choice(ARTICLES)
        noun = self._noun(concept, rng)
        return Thing(drawn=drawn, references=used, noun=noun, colour=colour, look=look, article=article)

    def _noun(self, concept: str, rng: random.Random) -> str:
        sample = self.samples[self.images_of[concept][0]]
        if sample.tags and rng.random() < 0.2:
            return rng.choice(sample.tags)
        plain = concept.removesuffix(" face") if sample.attributes["group"] == "nature" else concept
        return plain if plain[:2].isupper() else plain[0].lower() + plain[1:]

    def _paste(self, picture: Image.Image, image: int, where: Place, side: int, colour: str) -> None:
        drawing = self._drawing(image, side)
        if colour:
            drawing = recoloured(drawing, colour)
        picture.paste(drawing, where, drawing)

    def _drawing(self, image: int, side: int) -> Image.Image:
        if (image, side) not in self._drawings:
            self._drawings[image, side] = cut_out(self.samples[image].pixels(side))
        return self._drawings[image, side]

    def _group(self, concept: str) -> str:
        return self.samples[self.images_of[concept][0]].attributes["group"]

    @staticmethod
    def _surroundings(rng: random.Random) -> tuple[str, str, str]:
        if rng.random() < 0.5:
            return "white", "day", "clear"
        place = rng.choice([name for name in PLACES if name != "white"])
        outside = place not in ("water", "room")
        time = rng.choices(list(TIMES), (6, 3, 1))[0] if outside else "day"
        weather = rng.choices(list(WEATHERS), (8, 1, 1))[0] if outside else "clear"
        return place, time, weather

    @staticmethod
    def _finished(text: str, picture: Image.Image, used: tuple[Reference, ...], rng: random.Random) -> Scene:
        return Scene(caption=rng.choice(OPENINGS).format(text), picture=picture, references=used)


def _with_surroundings(text: str, place: str, time: str, weather: str, rng: random.Random) -> str:
    """Add phrases for the surroundings. The place is often left out where the time or the weather shows."""
    words = [rng.choice(PLACES[place]), rng.choice(TIMES[time]), rng.choice(WEATHERS[weather])]
    if place in COMMON_PLACES and any(words[1:]) and rng.random() < 0.6:
        words[0] = ""
    return " ".join([text, *filter(None, words)])


def _in_turns(of_things: Sequence[Sequence[int]], side: int) -> tuple[Reference, ...]:
    """Return the references in the order of the service: the first ones of all things, then the second ones."""
    turns = zip_longest(*of_things)
    return tuple(Reference(image, side) for turn in turns for image in turn if image is not None)


def _shares(total: int, parts: int) -> list[int]:
    """Split `total` references over `parts` things, the first ones getting more."""
    return [total // parts + (part < total % parts) for part in range(parts)]
