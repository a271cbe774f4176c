"""Teaches CLIP's text tower short and odd queries ("yellow fruit", "sad face"), the image tower staying as it is.

A query made of keywords has many right answers, which the contrast of `clip.py` takes for wrong ones. Here each
query is compared with the vectors of the whole corpus, and every image that has all its words is right. A fixed
"nothing" answer stands among them: made-up words must choose it, so cosines above it mean that something fits.
Image vectors do not change, so what was stored, and the generator's conditioning, stays valid.
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
"""What a right image's cosine must exceed. The trained CLIP gives right pairs 0.69 or more, 19 in 20 times."""

ASIDES = ("with a", "with", "in the", "on a", "in a", "and a", "on the", "near a", "for", "of the")
"""How a prompt goes on after what it is about: "a fox in the snow" should still find the fox."""

STOP_WORDS = frozenset({"and", "of", "the", "with", "a", "in", "on", "other", "for"})


class QueryStage:
    """Cross-entropy of each query with the share of right images, over all images and "nothing"."""

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
        """Everything one may call image `index`: keywords, words of its name and groups, colours."""
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
        """A query and its right answers: float32 (N + 1,), summing to 1, the last one being "nothing"."""
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
            text = f"{text} {rng.choice(ASIDES)} {self.aside(rng)}"
        target[fits] = 1 / len(fits)
        return text, target

    def aside(self, rng: random.Random) -> str:
        """A word that has nothing to do with the rest of the query: real half of the time."""
        if rng.random() < 0.5:
            return nonsense_text(rng).split()[0]
        return rng.choice(sorted(self.words[rng.randrange(len(self.words))]))

    def after_step(self, step: int) -> None:
        return None

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None
