"""Concepts: the things that a prompt names. Each gets references of its own.

The rules read English. They need no model, always end, and take time in proportion to the prompt. A prompt that they
do not understand stays whole.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CONCEPTS = 8
"""Most concepts of one prompt."""
MAX_HEADS = 2
"""Most heads of one concept: its last word, and its last two words."""


def split_prompt(prompt: str) -> list[str]:
    """Return the concepts of a prompt in its own words, at least one, at most `MAX_CONCEPTS`.

    `a robot holding a flower` has two. A part stays with its thing: `a red apple with a bite`. Words about style, words
    that the prompt excludes, and pronouns are left out. A prompt that names one thing and no style comes back as it is.
    """
    tokens = _tokens(prompt)
    if _is_foreign(tokens):
        return [prompt]
    phrases = [phrase for phrase in _phrases(_without_style(tokens)) if _names_a_thing(phrase)]
    concepts = {text.casefold(): text for text in (_text(prompt, phrase) for phrase in phrases)}
    return list(concepts.values())[:MAX_CONCEPTS] or [prompt]


def wordings(concept: str) -> list[str]:
    """Return the texts by which references for a concept are searched: as written, and in the singular if it differs.

    A CLIP may know `dog` and not `two dogs`. Another image may be captioned `two hearts`.
    """
    return list(dict.fromkeys([concept, singular(concept)]))


def heads(concept: str) -> list[str]:
    """Return the names of a concept without its first words, longest first, at most `MAX_HEADS`, in the singular.

    `a big juicy hamburger` has `juicy hamburger` and `hamburger`, `a pile of books` has `book`. A CLIP may know the
    name and not the name with further words. A text that names several things, or that is its only name, has none.
    """
    if _is_foreign(_tokens(concept)) or len(things := split_prompt(concept)) != 1:
        return []
    words = [token for token in _tokens(things[0]) if token.text[0].isalnum()]
    end = next((place for place, token in enumerate(words) if place and token.word in _ENDS_NAME), len(words))
    ends = [words[end - length : end] for length in range(min(MAX_HEADS, end), 0, -1)]
    names = [
        singular(_text(things[0], name))
        for name in ends
        if _names_a_thing(name) and _NOT_IN_NAMES.isdisjoint(token.word for token in name)
    ]
    return [name for name in dict.fromkeys(names) if name != concept]


def searched_texts(concept: str) -> list[str]:
    """Return the texts whose vectors the search of a concept needs: its wordings, then its heads, each once."""
    return list(dict.fromkeys([*wordings(concept), *heads(concept)]))


def singular(text: str) -> str:
    """Return the text of a concept without counting words and with its last noun in the singular: `dog` for `two dogs`.

    A text without a plural comes back as it is.
    """
    words, start = text.split(), 0
    while start < len(words) - 1 and _counts(words, start):
        start += 1
    nouns = words[start:]
    end = next((place for place, word in enumerate(nouns) if place and word.lower() in _ENDS_NOUN), len(nouns))
    one = _singular_word(nouns[end - 1]) if nouns else ""
    if not any(character.isalpha() for character in one):
        return text
    is_counted = any(word.lower() not in ("a", "an", "the") for word in words[:start])
    return " ".join([*nouns[: end - 1], one, *nouns[end:]]) if is_counted or one != nouns[end - 1] else text


def counts_several(text: str) -> bool:
    """Whether a concept asks for a number of things: `two dogs` and `a few apples`, but not `dogs` or `one dog`."""
    words = text.lower().split()
    is_counted = any(word in COUNTING - DETERMINERS - {"one"} or word.isdecimal() for word in words)
    return is_counted and not text.endswith(singular(text))


def _counts(words: Sequence[str], place: int) -> bool:
    word = words[place].lower()
    return word in COUNTING or word.isdecimal() or (word == "of" and place > 0 and words[place - 1].lower() in GROUPS)


# --- the vocabulary -----------------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words("a an the some any this that these those his her its their my your our another each every")
GROUPS = _words("dozens couple pair group bunch lots lot number")
COUNTING = (
    DETERMINERS
    | GROUPS
    | _words("one two three four five six seven eight nine ten eleven twelve dozen several many few both")
)
PREPOSITIONS = _words(
    "with on upon onto in inside into within under underneath below beneath over above at by near beside besides "
    "behind beyond between among around across along past through against towards toward atop outside as from"
)
OF_PREPOSITIONS = _words("next front top middle full made dressed surrounded covered filled")
"""Words before a preposition: `next to`, `in front of`, `full of`, `dressed as`."""
LINKS = _words("is are was were be being that which who whose that's who's it's there there's while where when")
NEGATIONS = _words("without no not never minus except excluding")
PRONOUNS = _words("it itself them themselves him himself her herself he she they one other others me us you something")
ADVERBS = _words(
    "very really quite also only together alone up down off out away back forward happily slowly quickly gently here "
    "please"
)
TRANSITIVE = re.compile(
    r"(?:hold|wear|rid|ride|carr|carry|eat|drink|play|us|use|read|driv|drive|chas|chase|hug|hugg|push|pull|throw|catch|"
    r"lift|kick|watch|kiss|paint|mak|make|bring|giv|give|hunt|cross|climb|featur|includ|contain|touch|wield|lick|bit|"
    r"bite|guard|offer|cut|cutt)(?:ing|ies|es|s)"
)
"""Verbs whose object may have no article: `wearing sunglasses`."""
NOUNS_IN_ING = _words(
    "king wing string spring thing building painting drawing wedding evening morning ceiling duckling pudding swing "
    "earring lightning clothing sling sting icing stocking"
) | {"ring"}
PARTS = _words(
    "bite eye ear nose tail leg arm hand foot paw hair fur mane beard moustache mustache face mouth smile grin tooth "
    "fang tongue cheek eyebrow horn antler tusk wing beak feather claw fin scale shell skin neck head body trunk "
    "stripe spot dot pattern stain crack hole handle lid leaf stem root branch window door roof wall chimney wheel "
    "sail button pocket sleeve strap lace edge frame tip side top bottom topping sprinkle frosting icing cream steam "
    "expression look pose cork straw tear freckle scar"
)
"""Parts of things. Behind `with`, a part stays with its thing."""
FOODS = _words(
    "cake cupcake pizza burger hamburger sandwich salad soup pancake toast pie cream waffle noodle pasta spaghetti "
    "taco bread bagel coffee tea cocktail stew curry sundae doughnut donut cookie rice steak"
)
"""Behind `with`, a noun without an article stays with its food: `pizza with olives`."""
PAIRS = {
    ("bow", "arrow"),
    ("nut", "bolt"),
    ("skull", "crossbones"),
    ("salt", "pepper"),
    ("fish", "chips"),
    ("knife", "fork"),
    ("fork", "knife"),
}
"""One thing with two names."""
COLOURS = _words(
    "red orange yellow green blue purple violet pink brown black white grey gray golden gold silver beige turquoise "
    "dark light striped spotted"
)
ADJECTIVES = COLOURS | _words(
    "big small little tiny huge large giant tall short long old young new round fat thin cute happy sad angry funny "
    "beautiful pretty ugly shiny fluffy furry wooden hot cold"
)
ABSTRACT = _words(
    "background foreground backdrop distance middle center centre front back left right side top bottom corner row "
    "line air style color colour colors colours motion action detail details view profile focus frame scene "
    "composition mood time love"
)
"""They say how or where a thing is shown. No picture shows them."""
STYLES = ABSTRACT | _words(
    "4k 8k 16k hd uhd hdr hq 3d 2d masterpiece realistic photorealistic hyperrealistic photorealism realism surreal "
    "cinematic detailed intricate sharp vivid vibrant bokeh octane unreal engine render rendered rendering cgi vector "
    "flat minimalist minimalism isometric lowpoly low poly pixel art artwork artstation trending deviantart digital "
    "concept illustration painting watercolor watercolour oil acrylic gouache ink charcoal pastel sketch drawing "
    "cartoon anime manga comic clipart sticker emoji icon logo photo photograph photography picture image portrait "
    "studio lighting soft dramatic natural ambient volumetric shot closeup close-up macro wide angle lens dslr film "
    "grain depth field shallow high resolution quality best ultra super highly extremely very hyper award winning "
    "beautiful aesthetic colorful colourful stylized retro vintage futuristic impressionist impressionism cubist "
    "cubism surrealism baroque abstract monochrome black white plain simple clean isolated transparent symmetrical "
    "centered of on in and with a an the"
)
"""A part of the prompt that has only these words is about style."""
PICTURES = _words(
    "drawing painting photo photograph picture image illustration portrait sketch render rendering watercolor "
    "watercolour cartoon emoji icon sticker logo close-up closeup scene view shot artwork drawings paintings photos "
    "pictures images"
)
"""Before `of`, they name the medium: `a drawing of a whale`."""
FOREIGN = _words(
    "der die das ein eine einen einer einem und mit auf le les une et avec dans sur des du el los las con y gli della "
    "um uma com het een van op och ett"
)
"""Frequent words of other European languages, in which `in` and `on` mean other things."""
_ENGLISH = _words("a an the and with of")
_NEED_MORE = DETERMINERS | PRONOUNS | _words("of for to")
_ENDS_NOUN = PREPOSITIONS | LINKS | _words("of and wearing holding")
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "people": "person",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "oxen": "ox",
    "leaves": "leaf",
    "loaves": "loaf",
    "hooves": "hoof",
    "scarves": "scarf",
    "thieves": "thief",
    "knives": "knife",
    "wives": "wife",
    "axes": "axe",
    "pickaxes": "pickaxe",
    "lenses": "lens",
    "canvases": "canvas",
    "quizzes": "quiz",
}
_ENDS_IN_IE = _words("cookies movies zombies selfies genies pixies smoothies brownies hoodies birdies bowties neckties")
_ENDS_IN_I = _words("skis taxis kiwis emojis bikinis safaris martinis")
_ALWAYS_PLURAL = _words(
    "scissors glasses sunglasses eyeglasses goggles jeans trousers shorts pants tongs pliers bagpipes binoculars "
    "headphones clothes fries fireworks christmas xmas species series news lens canvas rhinoceros"
)
"""Without another singular. Some of them name one thing."""
_ADDS_ES = re.compile(r"(?:ss|x|zz|sh|(?<!a)ch|[eo]ach|[^aefo]us|(?<=..)(?<!sh)(?<!can)(?<!ob)o)es$")
"""The plurals `dresses`, `branches`, `beaches`, `buses` and `tomatoes`, and not `headaches`, `houses` or `shoes`."""
_ENDS_NAME = _ENDS_NOUN - _words("of and")
_NOT_IN_NAMES = COUNTING | PRONOUNS | _ENDS_NOUN

# --- reading ------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\w[\w'’-]*|[^\w\s]|\n")  # noqa: RUF001 - the apostrophe of typeset text
_SPLITS = frozenset(',;.:!?|/\n()[]{}<>"+—–')  # noqa: RUF001 - dashes of typeset text


@dataclass(frozen=True)
class _Token:
    """A word or a mark of the prompt."""

    text: str
    start: int
    end: int

    @property
    def word(self) -> str:
        return self.text.lower()


Phrase = Sequence[_Token]


def _tokens(text: str) -> list[_Token]:
    return [_Token(found[0], found.start(), found.end()) for found in _TOKEN.finditer(text)]


def _is_foreign(tokens: Phrase) -> bool:
    """Whether the words are of another language, which these rules do not read."""
    words = {token.word for token in tokens}
    return bool(words & FOREIGN) and not words & _ENGLISH


def _without_style(tokens: Phrase) -> list[Phrase]:
    """Return the parts between punctuation marks, without those about style, exclusions, and names of the medium."""
    parts: list[list[_Token]] = [[]]
    for token in tokens:
        if token.word in _SPLITS:
            parts.append([])
        elif token.text[0].isalnum() or token.word == "&":
            parts[-1].append(token)
    kept: list[list[_Token]] = []
    for part in parts:
        part = _behind_medium(part)
        if not part or all(token.word in STYLES or token.word.isdecimal() for token in part):
            continue
        if part[0].word == "by" or [token.word for token in part[:3]] == ["in", "the", "style"]:
            continue
        # `a big, red car`: the comma stands between two adjectives.
        if kept and all(token.word in ADJECTIVES | DETERMINERS for token in kept[-1]):
            kept[-1].extend(part)
        else:
            kept.append(part)
    return list(kept)


def _behind_medium(part: list[_Token]) -> list[_Token]:
    for place, token in enumerate(part[:8]):
        if token.word == "of" and place and part[place - 1].word in PICTURES:
            return part[place + 1 :]
    return part


def _phrases(parts: Sequence[Phrase]) -> list[Phrase]:
    """Return the noun phrases of the parts: they end where another thing, a verb or an exclusion begins."""
    phrases: list[list[_Token]] = []
    for part in parts:
        phrase, excluded = list[_Token](), False
        telegraphic = not any(token.word in COUNTING for token in part)
        for place, token in enumerate(part):
            rest = part[place + 1 :]
            if token.word in NEGATIONS:
                phrases, phrase, excluded = [*phrases, phrase], [], True
            elif _separates(token, phrase, rest) and not (telegraphic and token.word == "with"):
                phrases, phrase = [*phrases, phrase], []
                excluded = excluded and token.word in ("or", "and")
            elif not excluded:
                phrase.append(token)
        phrases.append(phrase)
    return [stripped for phrase in phrases if (stripped := _stripped(phrase))]


def _separates(token: _Token, phrase: Phrase, rest: Phrase) -> bool:
    """Whether this word ends the phrase before it and belongs to none."""
    word, following = token.word, rest[0].word if rest else ""
    if word in ("and", "&", "or", "plus"):
        before = phrase[-1].word if phrase else ""
        if (before in ADJECTIVES and following in ADJECTIVES) or (before, following) in PAIRS:
            return False
        return not (any(each.word == "with" for each in phrase) and _is_part(rest, phrase))
    if word == "with":
        return not _is_part(rest, phrase)
    if word in PREPOSITIONS or word in LINKS:
        return True
    if word in OF_PREPOSITIONS:
        return following in ("to", "of", "as") or following in PREPOSITIONS
    if word in ("of", "to") and not phrase:
        return True
    if TRANSITIVE.fullmatch(word) and rest:
        return following in COUNTING or (bool(phrase) and phrase[-1].word not in DETERMINERS)
    return (
        word.endswith("ing")
        and word not in NOUNS_IN_ING
        and any(each.word not in COUNTING | ADJECTIVES for each in phrase)
        and phrase[-1].word not in _NEED_MORE
        and (not rest or following in COUNTING | PREPOSITIONS | ADVERBS | OF_PREPOSITIONS | PRONOUNS)
    )


def _is_part(rest: Phrase, phrase: Phrase) -> bool:
    """Whether the words up to the next preposition or verb name a part of the thing in `phrase`."""
    named: list[str] = []
    for token in rest:
        if token.word in PREPOSITIONS or token.word in LINKS or token.word in ("and", "&", "or", "of"):
            break
        named.append(token.word)
    if not named or not phrase:
        return False
    if any(_singular_word(each.word) in FOODS for each in phrase) and named[0] not in COUNTING:
        return True
    return _singular_word(named[-1]) in PARTS


def _stripped(phrase: Phrase) -> Phrase:
    """Leave out pronouns at the start, and words at the end that need another word."""
    first, last = 0, len(phrase)
    while first < last and phrase[first].word in PRONOUNS - COUNTING:
        first += 1
    while last > first and phrase[last - 1].word in _NEED_MORE:
        last -= 1
    return phrase[first:last]


def _names_a_thing(phrase: Phrase) -> bool:
    """Whether the phrase has a noun that a picture can show."""
    head = [token.word for token in phrase if token.word not in COUNTING]
    return bool(head) and head[-1] not in ABSTRACT and not all(word in STYLES | PRONOUNS | ADVERBS for word in head)


def _text(prompt: str, phrase: Phrase) -> str:
    return prompt[phrase[0].start : phrase[-1].end]


def _singular_word(word: str) -> str:
    lower = word.lower()
    if lower in _IRREGULAR:
        return _IRREGULAR[lower]
    if lower in _ALWAYS_PLURAL or len(lower) < 4:
        return word
    if lower.endswith("ies") and len(lower) > 4 and lower not in _ENDS_IN_IE:
        return word[:-3] + "y"
    if lower.endswith(("halves", "calves", "elves", "olves")):
        return word[:-3] + "f"
    if len(lower) > 5 and re.search(r"(?:wo|[^aiou])men$", lower):
        return word[:-2] + "an"
    if _ADDS_ES.search(lower):
        return word[:-2]
    if lower in _ENDS_IN_I or (lower.endswith("s") and not lower.endswith(("ss", "us", "is"))):
        return word[:-1]
    return word
