"""CLIP and its judge: open_clip models, trained by contrast of texts and drawings, and of drawing styles."""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from starter.data.corpus import MODEL_PX
from starter.train.dataset import Dataset, jitter, to_unit
from starter.train.optimizer import Optimizer, adamw
from starter.train.texts import main_colours, nonsense_text, random_caption
from starter.train.tokens import CONTEXT_LENGTH

MAX_LOGIT_SCALE = math.log(100)
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ClipShape:
    """The sizes of a CLIP: `text_*` are of the text tower, the others of the image tower."""

    embed_dim: int = 256
    patch: int = 16
    width: int = 256
    layers: int = 5
    head_width: int = 64
    text_width: int = 192
    text_heads: int = 6
    text_layers: int = 3

    def open_clip_config(self, vocab_size: int) -> dict[str, Any]:
        """The `model_cfg` of open_clip_config.json.

        `hf_tokenizer_name` is required but not used: a `local-dir:` model reads the tokenizer from its own folder.
        """
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {
                "image_size": MODEL_PX,
                "patch_size": self.patch,
                "width": self.width,
                "layers": self.layers,
                "head_width": self.head_width,
            },
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": vocab_size,
                "width": self.text_width,
                "heads": self.text_heads,
                "layers": self.text_layers,
                "hf_tokenizer_name": "starter",
            },
        }


RETRIEVER = ClipShape()
JUDGE = ClipShape(width=160, layers=5, head_width=40, text_width=128, text_heads=4, text_layers=3, embed_dim=192)


def build_clip(shape: ClipShape, vocab_size: int) -> nn.Module:
    """Build an untrained `open_clip.CLIP`."""
    model: nn.Module = open_clip.model.CLIP(**shape.open_clip_config(vocab_size))
    return model


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Return token ids, int64 (B, CONTEXT_LENGTH), padded with id 0."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
    ).input_ids
    return ids.to(torch.get_default_device())


def encode_text(model: Any, ids: Tensor) -> Tensor:
    """Do as `open_clip.CLIP.encode_text`, without columns that are padding in every row.

    The result is the same, because attention is causal and pooling takes the end-of-text token.
    """
    length = int((ids != 0).sum(dim=1).max())
    states = model.token_embedding(ids[:, :length]) + model.positional_embedding[:length]
    states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask[:length, :length]))
    pooled: Tensor = states[torch.arange(len(ids)), ids.argmax(dim=1)] @ model.text_projection
    return pooled


@torch.no_grad()
def image_vectors(clip: Any, pixels: Tensor) -> Tensor:
    """Return the L2-normalised vectors, float32 (N, E), of pixels, uint8 (N, 3, S, S)."""
    clip.eval()
    return torch.cat(
        [F.normalize(clip.encode_image(to_unit(batch)).float(), dim=-1) for batch in torch.split(pixels, 128)]
    )


def contrastive_loss(a: Tensor, b: Tensor, logit_scale: Tensor, wrong_b: Tensor | None = None) -> Tensor:
    """Return the symmetric InfoNCE loss (arXiv:2103.00020).

    Args:
        a, b: L2-normalised, shape (B, E); row i of `a` matches row i of `b`.
        wrong_b: further rows that match no row of `a`, shape (N, E).
    """
    choices = b if wrong_b is None else torch.cat([b, wrong_b])
    labels = torch.arange(len(a))
    forth = F.cross_entropy(logit_scale * a @ choices.T, labels)
    back = F.cross_entropy(logit_scale * b @ a.T, labels)
    return (forth + back) / 2


class ClipStage:
    """Loss: text-image contrast for two drawings, plus `style_weight` times the contrast between the two drawings.

    A batch has distinct concepts, so that no negative is false, each in two styles.
    """

    betas = (0.9, 0.98)
    weight_decay = 0.1
    nonsense = 24

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: CLIPTokenizer,
        shape: ClipShape = RETRIEVER,
        *,
        name: str = "clip",
        batch: int = 128,
        learning_rate: float = 1e-3,
        style_weight: float = 0.4,
        colours: list[list[str]] | None = None,
    ) -> None:
        self.name = name
        self.shape = shape
        self.tokenizer = tokenizer
        self.module = build_clip(shape, len(tokenizer))
        self.learning_rate = learning_rate
        self.batch = min(batch, len(dataset.names))
        self.style_weight = style_weight
        self.dataset = dataset
        self.members = dataset.images_of
        self.colours = colours or [main_colours(pixels) for pixels in dataset.pixels]

    def optimizer(self) -> Optimizer:
        return adamw(self.module, learning_rate=self.learning_rate, weight_decay=self.weight_decay, betas=self.betas)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(int(torch.randint(2**31, ()).item()))
        concepts = torch.randperm(len(self.members))[: self.batch].tolist()
        pairs = [rng.sample(self.members[c], 2) if len(self.members[c]) > 1 else self.members[c] * 2 for c in concepts]
        chosen = torch.tensor(pairs).T.reshape(-1)
        images = jitter(to_unit(self.dataset.pixels[chosen]))
        texts = [random_caption(self.dataset.samples[i], self.colours[i], rng) for i in chosen.tolist()]
        model: Any = self.module
        image = F.normalize(model.encode_image(images).float(), dim=-1)
        texts += [nonsense_text(rng) for _ in range(self.nonsense)]
        text = F.normalize(encode_text(model, tokenize(self.tokenizer, texts)).float(), dim=-1)
        text, nonsense = torch.split(text, [len(chosen), self.nonsense])
        scale = model.logit_scale.exp()
        first, second = image.chunk(2)
        text_first, text_second = text.chunk(2)
        by_text = (
            contrastive_loss(first, text_first, scale, nonsense) / 2
            + contrastive_loss(second, text_second, scale, nonsense) / 2
        )
        by_style = contrastive_loss(first, second, scale)
        accuracy = ((first @ text_first.T).argmax(1) == torch.arange(len(first))).float().mean()
        figures = {"text": by_text.item(), "style": by_style.item(), "accuracy": accuracy.item()}
        return by_text + self.style_weight * by_style, {**figures, "logit_scale": scale.item()}

    def after_step(self, step: int) -> None:
        with torch.no_grad():
            self.module.logit_scale.clamp_(0, MAX_LOGIT_SCALE)  # type: ignore[operator]

    def extra_state(self) -> dict[str, Any]:
        return {"shape": asdict(self.shape)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if state["shape"] != asdict(self.shape):
            raise ValueError(f"the checkpoint has another shape: {state['shape']}")
