"""Train CLIP's text tower on short and unusual queries ("yellow fruit", "sad face"); the image tower is not changed.

A query of keywords has many right answers, but the contrast of `clip.py` treats most of them as wrong. Here each query
is compared with the vectors of the whole corpus, and every image with all its words is right. A fixed "nothing" answer
is the right one for made-up words, so a cosine above it means a match. Image vectors do not change, so stored vectors
and the generator's conditioning stay valid.
"""

import random
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from starter.train.clip import encode_text, image_vectors, tokenize
from starter.train.dataset import Dataset
from starter.train.optimizer import Optimizer, adamw
from starter.train.texts import NAME_TEMPLATES, STYLE_PHRASES, main_colours, nonsense_text

NOTHING_COSINE = 0.45
"""Cosine of the "nothing" answer, which right images must exceed. Trained, 95 % of right pairs have 0.69 or more."""

UNRELATED_LINKS = ("with a", "with", "in the", "on a", "in a", "and a", "on the", "near a", "for", "of the")
"""Links to an unrelated word at the end of a query: "a fox in the snow" should still find the fox."""

STOP_WORDS = frozenset({"and", "of", "the", "with", "a", "in", "on", "other", "for"})


class QueryStage:
    """Loss: cross-entropy of each query, over all images and "nothing", with equal shares of the right images."""

    name = "queries"
    weight_decay = 0.05
    betas = (0.9, 0.98)
    nonsense = 0.12

    def __init__(
        self,
        dataset: Dataset,
        clip: nn.Module,
        tokenizer: CLIPTokenizer,
        *,
        batch: int = 128,
        learning_rate: float = 3e-4,
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
        self.store = image_vectors(clip, dataset.pixels)
        self.colours = [main_colours(pixels) for pixels in dataset.pixels]
        self.words = [self.words_of(index) for index in range(len(self.samples))]

    def words_of(self, index: int) -> frozenset[str]:
        """Return all words that describe image `index`: keywords, words of its name and groups, colours."""
        sample = self.samples[index]
        texts = (sample.caption, sample.attributes["group"], sample.attributes["subgroup"].replace("-", " "))
        single = {word for text in texts for word in re.findall(r"[a-z']+", text.lower())}
        return frozenset((single | set(sample.tags) | set(self.colours[index])) - STOP_WORDS)

    def optimizer(self) -> Optimizer:
        return adamw(self.module, learning_rate=self.learning_rate, weight_decay=self.weight_decay, betas=self.betas)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(int(torch.randint(2**31, ()).item()))
        queries, right = zip(*(self.random_query(rng) for _ in range(self.batch)), strict=True)
        target = torch.stack(right)
        model: Any = self.module
        text = F.normalize(encode_text(model, tokenize(self.tokenizer, list(queries))).float(), dim=-1)
        cosine = torch.cat([text @ self.store.T, torch.full((len(text), 1), NOTHING_COSINE)], dim=1)
        loss = F.cross_entropy(model.logit_scale.exp() * cosine, target)
        hits = target[torch.arange(len(target)), cosine.argmax(dim=1)] > 0
        return loss, {"accuracy": hits.float().mean().item()}

    def random_query(self, rng: random.Random) -> tuple[str, Tensor]:
        """Return a query and the shares of its right answers: float32 (N + 1,), sum 1, the last is "nothing"."""
        target = torch.zeros(len(self.samples) + 1)
        if rng.random() < self.nonsense:
            target[-1] = 1
            return nonsense_text(rng), target
        index = rng.randrange(len(self.samples))
        sample = self.samples[index]
        colour = rng.choice(self.colours[index]) if self.colours[index] and rng.random() < 0.35 else ""
        wanted = {colour} if colour else set()
        if rng.random() < 0.4:
            text = rng.choice(NAME_TEMPLATES).format(sample.caption)
            fits = [i for i, other in enumerate(self.samples) if other.concept == sample.concept]
        else:
            chosen = rng.sample(sorted(self.words[index] - set(self.colours[index])), rng.choice((1, 1, 2, 2, 3)))
            wanted |= set(chosen)
            text = rng.choice((" ", " ", ", ")).join(chosen)
            fits = [i for i, words in enumerate(self.words) if wanted <= words]
        if colour:
            fits = [i for i in fits if colour in self.colours[i]]
            text = f"{colour} {text}"
        if rng.random() < 0.1:
            style = sample.attributes["style"]
            fits = [i for i in fits if self.samples[i].attributes["style"] == style]
            text = f"{text}, {STYLE_PHRASES[style]}"
        if rng.random() < 0.3:
            text = f"{text} {rng.choice(UNRELATED_LINKS)} {self.unrelated_word(rng)}"
        target[fits] = 1 / len(fits)
        return text, target

    def unrelated_word(self, rng: random.Random) -> str:
        """Return a word unrelated to the rest of the query; half of the time it is made up."""
        if rng.random() < 0.5:
            return nonsense_text(rng).split()[0]
        return rng.choice(sorted(self.words[rng.randrange(len(self.words))]))

    def after_step(self, step: int) -> None:
        return None

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None
