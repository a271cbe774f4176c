"""Select the concepts of the corpus, their names and keywords, and those held out of the generator's training."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starter.data.packages import load_json

GROUPS = {
    0: "smileys",
    1: "people",
    3: "nature",
    4: "food",
    5: "travel",
    6: "activities",
    7: "objects",
}
"""Our names by Emojibase group number. Symbols and flags are left out: a 64 px model learns nothing from signs."""


def listed(text: str) -> tuple[str, ...]:
    """Return the parts of a text between `|`, each with single spaces."""
    return tuple(" ".join(part.split()) for part in text.split("|"))


def _names(text: str) -> frozenset[str]:
    return frozenset(listed(text))


PEOPLE_GROUP = 1
HAND_AND_BODY = frozenset(range(16, 23))
PEOPLE_KEPT = _names(
    """
    baby | child | boy | girl | man | woman | older person | old man | old woman | person: beard | cook
    | farmer | astronaut | firefighter | police officer | detective | guard | ninja | construction
    worker | health worker | prince | princess | baby angel | Santa Claus | superhero | mage | fairy |
    vampire | mermaid | elf | genie | zombie | troll | snowboarder | footprints | bust in silhouette
    """
)
"""The kept drawings of whole people, one of each kind. Their many variants cost capacity and look alike at 64 px."""

NEAR_DUPLICATES = _names(
    """
    rightwards hand | leftwards hand | leftwards pushing hand | rightwards pushing hand | raised back of
    hand | hand with index finger and thumb crossed | middle finger | index pointing at the viewer |
    right-facing fist | grinning face with smiling eyes | kissing face with smiling eyes | kissing face
    with closed eyes | face with open eyes and hand over mouth | head shaking horizontally | head
    shaking vertically | frowning face with open mouth | hushed face | anguished face | smiling cat with
    heart-eyes | grinning cat with smiling eyes | speak-no-evil monkey | heart decoration | revolving
    hearts | growing heart | eye in speech bubble | left speech bubble | guide dog | service dog | water
    buffalo | two-hump camel | rat | front-facing baby chick | globe showing Americas | globe showing
    Asia-Australia | Japanese post office | love hotel | tram car | mountain railway | railway car |
    oncoming bus | trolleybus | oncoming police car | oncoming taxi | oncoming automobile | airplane
    departure | airplane arrival | new moon | waxing gibbous moon | waning gibbous moon | waning
    crescent moon | last quarter moon | last quarter moon face | sun behind small cloud | sun behind
    large cloud | umbrella on ground | snowman without snow | 2nd place medal | 3rd place medal |
    softball | speaker low volume | speaker medium volume | euro banknote | pound banknote | closed
    mailbox with lowered flag | open mailbox with lowered flag | incoming envelope | outbox tray | page
    facing up | spiral calendar | linked paperclips | magnifying glass tilted right | chart decreasing |
    locked with pen | minibus | motor boat | notebook | bookmark tabs | horizontal traffic light |
    musical notes | low battery | bell with slash | camera with flash | tear-off calendar
    """
)
"""Dropped: each is another drawing with a detail that 64 px hardly show. `is_kept` drops clock faces."""

KEPT_CLOCK = "three o'clock"
HELD_OUT_PER_GROUP = {0: 12, 1: 6, 3: 26, 4: 22, 5: 12, 6: 8, 7: 18}
MAX_TAGS = 14


@dataclass(frozen=True)
class Concept:
    """One thing: its key (a code point sequence), its English name, its keywords, its group."""

    key: str
    name: str
    tags: tuple[str, ...]
    group: int
    subgroup: str

    @property
    def group_name(self) -> str:
        return GROUPS[self.group]


def load_concepts(names: Path, keywords: Path) -> list[Concept]:
    """Return the kept concepts in Unicode order. names, keywords: folders of unpacked emojibase-data and emojilib."""
    entries: list[dict[str, Any]] = load_json(names / "en" / "data.json")
    subgroups: dict[str, str] = load_json(names / "meta" / "groups.json")["subgroups"]
    keyword_lists: dict[str, list[str]] = load_json(keywords / "dist" / "emoji-en-US.json")
    concepts = []
    for entry in sorted(entries, key=lambda entry: int(entry.get("order", 0))):
        name = plain(entry["label"])
        if is_kept(name, group=entry.get("group"), subgroup=entry.get("subgroup")):
            words = [*entry.get("tags", ()), *keyword_lists.get(entry["emoji"], ())]
            concepts.append(
                Concept(
                    key=entry["hexcode"].lower().replace("-fe0f", ""),
                    name=name,
                    tags=clean_tags(words, name=name),
                    group=entry["group"],
                    subgroup=subgroups[str(entry["subgroup"])],
                )
            )
    return concepts


def is_kept(name: str, *, group: int | None, subgroup: int | None) -> bool:
    if group not in GROUPS or name in NEAR_DUPLICATES:
        return False
    if group == PEOPLE_GROUP and subgroup not in HAND_AND_BODY:
        return name in PEOPLE_KEPT
    return name == KEPT_CLOCK or not re.search(r"o'clock$|-thirty$", name)


def plain(text: str) -> str:
    return text.replace("\u2019", "'").strip()


def clean_tags(words: Iterable[str], *, name: str) -> tuple[str, ...]:
    """Return at most MAX_TAGS lower-case keywords without emoticons, repetitions and the name itself."""
    tags = (plain(word).replace("_", " ").lower() for word in words)
    wanted = (tag for tag in tags if re.fullmatch(r"[a-z][a-z' -]{1,29}", tag) and tag != name.lower())
    return tuple(dict.fromkeys(wanted))[:MAX_TAGS]


def held_out_keys(concepts: Iterable[Concept]) -> frozenset[str]:
    """Return the keys held out of the generator's training: a fixed number per group, chosen by the name's digest.

    With a digest instead of a random generator, a new concept does not change the choice among the others.
    """
    by_group: dict[int, list[Concept]] = {}
    for concept in concepts:
        by_group.setdefault(concept.group, []).append(concept)
    chosen: set[str] = set()
    for group, members in by_group.items():
        members.sort(key=lambda concept: hashlib.sha256(concept.name.encode()).hexdigest())
        chosen.update(concept.key for concept in members[: HELD_OUT_PER_GROUP[group]])
    return frozenset(chosen)
