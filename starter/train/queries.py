"""Train CLIP's text tower on everyday queries ("two puppies", "something to drink"); the image tower is not changed.

A query has many right answers, but the contrast of `clip.py` treats most of them as wrong. Here each query is compared
with the vectors of the whole corpus, and every image that fits is right. A fixed "nothing" answer is the right one for
made-up words and for things without an image, so a cosine above it means a match. Image vectors do not change.
But the weights of both towers identify the embedding space, so with a new text tower all images are embedded again.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from starter.train.clip import encode_text, image_vectors, tokenize
from starter.train.dataset import Dataset
from starter.train.optimizer import Optimizer, adamw
from starter.train.texts import (
    NAME_TEMPLATES,
    STYLE_PHRASES,
    SUBJECTS,
    main_colours,
    nonsense_text,
    phrase,
    plural,
    with_article,
)
from starter.train.vocabulary import Vocabulary, load_vocabulary

NOTHING_COSINE = 0.45
"""Cosine of the "nothing" answer, which right images must exceed."""

UNRELATED_LINKS = ("with a", "with", "in the", "on a", "in a", "and a", "on the", "near a", "for", "of the")
"""Links to an unrelated word at the end of a query: "a fox in the snow" should still find the fox."""

PAIR_LINKS = ("and", "and", "next to", "beside", "together with")
"""Links between two things of equal weight."""

STOP_WORDS = frozenset({"and", "of", "the", "with", "a", "in", "on", "other", "for"})

SHARES = {
    "name": 0.2,
    "keywords": 0.3,
    "same": 0.08,
    "narrower": 0.07,
    "broader": 0.06,
    "gloss": 0.02,
    "theme": 0.07,
    "pair": 0.03,
    "absent": 0.11,
    "nonsense": 0.06,
}
"""Shares of the kinds of queries. A kind without any text is left out."""

GROUPS = 4
"""Groups of texts with similar lengths in one batch."""

Query = tuple[str, Sequence[int]]
"""A text and the indices of the right images. Without right images, "nothing" is the right answer."""


class QueryStage:
    """Loss: the mean of two cross-entropies of each query, over all images and "nothing".

    One has equal shares of the right images as its target. The other one asks for any right image. It keeps a broad
    query near typical images, because the mean of many images is near to no image.
    """

    name = "queries"
    weight_decay = 0.05
    betas = (0.9, 0.98)

    def __init__(
        self,
        dataset: Dataset,
        clip: nn.Module,
        tokenizer: CLIPTokenizer,
        *,
        vocabulary: Vocabulary | None = None,
        batch: int = 192,
        learning_rate: float = 5e-4,
    ) -> None:
        self.module = clip
        trained: Any = clip
        clip.requires_grad_(True)
        trained.visual.requires_grad_(False)
        trained.logit_scale.requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch = batch
        self.learning_rate = learning_rate
        self.samples = dataset.samples
        self.names = dataset.names
        self.store = image_vectors(clip, dataset.pixels)
        self.colours = [main_colours(pixels) for pixels in dataset.pixels]
        self.words = [self.words_of(index) for index in range(len(self.samples))]
        self.vocabulary = vocabulary or load_vocabulary()
        self.images_of_thing: dict[str, set[int]] = defaultdict(set)
        self.images_of_word: dict[str, set[int]] = defaultdict(set)
        self.images_of_tag: dict[str, set[int]] = defaultdict(set)
        for index, sample in enumerate(self.samples):
            for thing in (sample.concept, f"[{sample.attributes['subgroup']}]"):
                self.images_of_thing[thing].add(index)
            for word in self.words[index]:
                self.images_of_word[word].add(index)
            for tag in sample.tags:
                self.images_of_tag[tag].add(index)
        self.texts = self.texts_by_kind()
        self.kinds = [kind for kind in SHARES if self.texts.get(kind, True)]

    def words_of(self, index: int) -> frozenset[str]:
        """Return all words that describe image `index`: keywords, words of its name and groups, colours."""
        sample = self.samples[index]
        texts = (sample.caption, sample.attributes["group"], sample.attributes["subgroup"].replace("-", " "))
        single = {word for text in texts for word in re.findall(r"[a-z']+", text.lower())}
        return frozenset((single | set(sample.tags) | set(self.colours[index])) - STOP_WORDS)

    def texts_by_kind(self) -> dict[str, list[Query]]:
        vocabulary = self.vocabulary
        texts: dict[str, list[Query]] = defaultdict(list)
        for each in vocabulary.words:
            texts[each.relation] += [(word, self.images(each.things, word)) for word in each.words]
            texts["gloss"] += [(each.gloss, self.images(each.things))] if each.gloss else []
        for theme in vocabulary.themes:
            right = self.images(theme.things)
            texts["theme"] += [(text, right) for text in theme.phrases]
        known = {kind: [query for query in queries if query[1]] for kind, queries in texts.items()}
        return {**known, "absent": [(word, ()) for word in vocabulary.absent]}

    def images(self, things: Iterable[str], tag: str = "") -> list[int]:
        """Return the indices of the images of things and of subgroups in brackets, and of those with `tag`."""
        found = set(self.images_of_tag.get(tag, ()))
        return sorted(found.union(*(self.images_of_thing.get(thing, ()) for thing in things)))

    def optimizer(self) -> Optimizer:
        return adamw(self.module, learning_rate=self.learning_rate, weight_decay=self.weight_decay, betas=self.betas)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(int(torch.randint(2**31, ()).item()))
        texts, right = zip(*(self.random_query(rng) for _ in range(self.batch)), strict=True)
        is_right = torch.zeros(self.batch, len(self.samples) + 1, dtype=torch.bool)
        for row, images in zip(is_right, right, strict=True):
            row[images or [-1]] = True
        model: Any = self.module
        text = F.normalize(self.encode(list(texts)).float(), dim=-1)
        cosine = torch.cat([text @ self.store.T, torch.full((len(text), 1), NOTHING_COSINE)], dim=1)
        likelihood = (model.logit_scale.exp() * cosine).float().log_softmax(dim=1)
        each = likelihood.where(is_right, 0).sum(dim=1) / is_right.sum(dim=1)
        any_right = likelihood.where(is_right, -torch.inf).logsumexp(dim=1)
        hits = is_right[torch.arange(len(text)), cosine.argmax(dim=1)]
        return -(each + any_right).mean() / 2, {"accuracy": hits.float().mean().item()}

    def encode(self, texts: list[str]) -> Tensor:
        """Return the vectors of texts, (B, E), computed in groups of similar length: it takes half the time."""
        ids = tokenize(self.tokenizer, texts)
        order = (ids != 0).sum(dim=1).argsort()
        vectors = torch.cat([encode_text(self.module, ids[group]) for group in order.chunk(GROUPS)])
        return vectors[order.argsort()]

    def random_query(self, rng: random.Random) -> Query:
        """Return a query of a random kind."""
        kind = rng.choices(self.kinds, [SHARES[kind] for kind in self.kinds])[0]
        if kind == "name":
            return self.with_aside(self.name_query(rng), rng)
        if kind == "keywords":
            return self.with_aside(self.keyword_query(rng), rng)
        if kind == "pair":
            (first, right), (second, others) = self.word_query(rng), self.word_query(rng)
            text = f"{with_article(first)} {rng.choice(PAIR_LINKS)} {with_article(second)}"
            return text, [*right, *others]
        if kind == "nonsense":
            words = rng.sample(self.vocabulary.abstract, rng.randint(1, 3)) if self.vocabulary.abstract else ()
            return (" ".join(words) if words and rng.random() < 0.5 else nonsense_text(rng)), ()
        text, right = rng.choice(self.texts[kind])
        if kind == "gloss":
            words = text.split()
            start = rng.randrange(max(1, len(words) - 4))
            return " ".join(words[start : start + rng.randint(4, 12)]), right
        if kind == "theme":
            return (rng.choice(SUBJECTS).format(text) if rng.random() < 0.4 else text), right
        return self.in_colour(phrase(text, rng), right, rng, share=0.15)

    def name_query(self, rng: random.Random) -> Query:
        sample = rng.choice(self.samples)
        name = sample.caption.removesuffix(" face") if rng.random() < 0.3 else sample.caption
        text = rng.choice(NAME_TEMPLATES).format(name) if rng.random() < 0.5 else phrase(name, rng)
        right = self.images([sample.concept, name])
        if rng.random() < 0.15:
            style = sample.attributes["style"]
            right = [index for index in right if self.samples[index].attributes["style"] == style] or right
            return f"{text}, {STYLE_PHRASES[style]}", right
        return self.in_colour(text, right, rng, share=0.35)

    def word_query(self, rng: random.Random) -> Query:
        """Return the name of a thing, or a word with the same meaning."""
        if self.texts["same"] and rng.random() < 0.5:
            return rng.choice(self.texts["same"])
        name = rng.choice(self.names)
        return name, self.images([name])

    def keyword_query(self, rng: random.Random) -> Query:
        """Return one to three keywords of an image; all images with all of them are right."""
        index = rng.randrange(len(self.samples))
        choice = sorted(self.words[index] - set(self.colours[index]))
        chosen = rng.sample(choice, min(len(choice), rng.choice((1, 1, 2, 2, 3))))
        right = sorted(set.intersection(*(self.images_of_word[word] for word in chosen)))
        if len(chosen) == 1 and rng.random() < 0.4:
            return self.in_colour(rng.choice((plural, with_article))(chosen[0]), right, rng, share=0.35)
        return self.in_colour(rng.choice((" ", " ", ", ")).join(chosen), right, rng, share=0.35)

    def in_colour(self, text: str, right: Sequence[int], rng: random.Random, *, share: float) -> Query:
        """Put a colour of a right image before the text in a share of the cases; only images with it stay right."""
        if not right or rng.random() > share:
            return text, right
        colours = self.colours[rng.choice(right)]
        if not colours:
            return text, right
        colour = rng.choice(colours)
        article, _, noun = text.partition(" ")
        coloured = f"{article} {colour} {noun}" if article in ("a", "an") else f"{colour} {text}"
        return coloured, [index for index in right if colour in self.colours[index]]

    def with_aside(self, query: Query, rng: random.Random) -> Query:
        """Append an unrelated word in 30 % of the cases; half of these words are made up."""
        text, right = query
        if rng.random() > 0.3:
            return query
        made_up = rng.random() < 0.5
        word = nonsense_text(rng).split()[0] if made_up else rng.choice(sorted(rng.choice(self.words)))
        return f"{text} {rng.choice(UNRELATED_LINKS)} {word}", right

    def after_step(self, step: int) -> None:
        return None

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None
