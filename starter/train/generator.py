"""The generator: a small FLUX.2 transformer that reads its references as pictures, and its text encoder.

Both train together from nothing. The parts form a `Flux2KleinPipeline`, and the training uses its positions and its
velocity. A batch has one number of references of one side, so that its rows have the same length.
"""

import copy
import json
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from starter.data.corpus import IMAGE_PX, Sample
from starter.train.autoencoder import TOKEN_CHANNELS, TOKEN_PX, encode
from starter.train.backgrounds import LANDSCAPES, PLACES, TIMES, WEATHERS
from starter.train.cutouts import HUES
from starter.train.dataset import to_unit
from starter.train.optimizer import MuonWithAdamW, Optimizer, adamw, has_bfloat16
from starter.train.scenes import (
    FULL_SIDE,
    HALF_SIDE,
    LOOKS,
    NUMBERS,
    OPENINGS,
    RELATIONS,
    Reference,
    Scene,
    SceneMaker,
)
from starter.train.texts import plural

VOCABULARY = 3000
TEXT_TOKENS = 24
END = "<|endoftext|>"
TEXT_WIDTH = 192
TEXT_LAYERS = 3
HEAD = 32
WIDTH = 192
DOUBLE_BLOCKS, SINGLE_BLOCKS = 2, 6
REFERENCE_SPACING = 10
"""The distance of two references on the first position axis, as in Flux2KleinPipeline."""

CONTENT_ONLY = "{% for message in messages %}{{ message['content'] | lower }}{% endfor %}"
"""The chat template: the prompt itself. The pipeline always applies a template."""

KINDS: dict[tuple[int, int], float] = {
    (0, FULL_SIDE): 0.15,
    (1, FULL_SIDE): 0.20,
    (2, FULL_SIDE): 0.08,
    (3, FULL_SIDE): 0.06,
    (4, FULL_SIDE): 0.08,
    (1, HALF_SIDE): 0.06,
    (2, HALF_SIDE): 0.19,
    (3, HALF_SIDE): 0.12,
    (4, HALF_SIDE): 0.06,
}
"""Probability of each number of references and their side."""


def learn_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """Learn the byte pairs of `texts` in lower case for a Qwen2Tokenizer of at most VOCABULARY entries."""
    bpe = copy.deepcopy(Qwen2Tokenizer().backend_tokenizer)
    bpe.model = models.BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END],
        show_progress=False,
    )
    bpe.train_from_iterator((text.lower() for text in texts), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=bpe.get_vocab(), merges=merges, model_max_length=TEXT_TOKENS)
    tokenizer.chat_template = CONTENT_ONLY
    return tokenizer


def build_text_encoder(vocabulary: int, pad_token_id: int) -> Qwen3ForCausalLM:
    """Build an untrained text encoder. Its last hidden states, width TEXT_WIDTH, condition the generator."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=TEXT_WIDTH // HEAD,
            num_key_value_heads=TEXT_WIDTH // HEAD,
            head_dim=HEAD,
            max_position_embeddings=TEXT_TOKENS,
            tie_word_embeddings=True,
            pad_token_id=pad_token_id,
        )
    )


def build_transformer(width: int = WIDTH) -> Flux2Transformer2DModel:
    """Build an untrained transformer. Its last layer is zero, so that it begins with the velocity 0."""
    transformer = Flux2Transformer2DModel(
        in_channels=TOKEN_CHANNELS,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=128,
        axes_dims_rope=(HEAD // 4,) * 4,
        guidance_embeds=False,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    for modulation in (
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
    ):
        nn.init.zeros_(modulation.linear.weight)
    return transformer


class GeneratorStage:
    """Trains the velocity of a rectified flow (arXiv:2209.03003) and keeps a running average of the weights."""

    name = "generator"
    weight_decay = 0.01
    betas = (0.9, 0.99)
    ema_decay = 0.9993
    drop_text = 0.12

    def __init__(
        self,
        samples: list[Sample],
        autoencoder: AutoencoderKLFlux2,
        tokenizer: Qwen2Tokenizer,
        *,
        batch: int = 32,
        learning_rate: float = 6e-4,
    ) -> None:
        self.samples = samples
        self.scenes = SceneMaker(samples)
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_encoder = build_text_encoder(len(tokenizer), tokenizer.pad_token_id)
        self.transformer = build_transformer()
        self.module: nn.Module = nn.ModuleDict({"transformer": self.transformer, "text_encoder": self.text_encoder})
        self.average = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.batch = batch
        self.learning_rate = learning_rate
        self._references: dict[Reference, Tensor] = {}

    def optimizer(self) -> Optimizer:
        """Muon, or AdamW where Muon's bfloat16 products would take three times as long as the rest of a step."""
        choice = MuonWithAdamW if has_bfloat16() else adamw
        return choice(self.module, learning_rate=self.learning_rate, weight_decay=self.weight_decay, betas=self.betas)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(int(torch.randint(2**31, ()).item()))
        count, side = rng.choices(list(KINDS), list(KINDS.values()))[0]
        scenes = [self.scenes.scene(rng, references=count, side=side) for _ in range(self.batch)]
        captions = ["" if rng.random() < self.drop_text else scene.caption for scene in scenes]
        clean = self.encode_pictures(scenes)
        grid = IMAGE_PX // TOKEN_PX
        noise = torch.randn_like(clean)
        sigma = random_sigmas(len(scenes))
        noisy = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
        rows, positions = self.with_references(noisy, positions_of(grid, 0), scenes, side)
        text = self.encode_text(captions)
        predicted = self.transformer(
            hidden_states=rows,
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=text_positions(),
            img_ids=positions,
            return_dict=False,
        )[0][:, : grid * grid].float()
        loss = F.mse_loss(predicted, noise - clean)
        return loss, {f"v{count}_{side}": loss.item()}

    @torch.no_grad()
    def encode_pictures(self, scenes: list[Scene]) -> Tensor:
        """Return the scenes' tokens: float32 (B, tokens, TOKEN_CHANNELS)."""
        pixels = np.stack([np.asarray(scene.picture) for scene in scenes]).transpose(0, 3, 1, 2)
        return encode(self.autoencoder, to_unit(torch.from_numpy(pixels.copy()))).flatten(2).transpose(1, 2)

    def with_references(
        self, noisy: Tensor, positions: Tensor, scenes: list[Scene], side: int
    ) -> tuple[Tensor, Tensor]:
        """Append the tokens and positions of the references, the first at REFERENCE_SPACING on the first axis."""
        count = len(scenes[0].references)
        if count == 0:
            return noisy, positions
        tokens = torch.stack([torch.cat([self._tokens(one) for one in scene.references]) for scene in scenes])
        places = [positions_of(side // TOKEN_PX, REFERENCE_SPACING * (index + 1)) for index in range(count)]
        return torch.cat([noisy, tokens], dim=1), torch.cat([positions, *places])

    @torch.no_grad()
    def _tokens(self, reference: Reference) -> Tensor:
        if reference not in self._references:
            pixels = self.samples[reference.image].pixels(reference.side).transpose(2, 0, 1)[None]
            tokens = encode(self.autoencoder, to_unit(torch.from_numpy(pixels.copy())))
            self._references[reference] = tokens[0].flatten(1).T.contiguous()
        return self._references[reference]

    def encode_text(self, captions: list[str]) -> Tensor:
        """Return the text states (B, TEXT_TOKENS, TEXT_WIDTH) as Flux2KleinPipeline computes them."""
        ids = self.tokenizer(
            [caption.lower() for caption in captions],
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=TEXT_TOKENS,
        ).to(torch.get_default_device())
        states: Tensor = self.text_encoder.model(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], use_cache=False
        ).last_hidden_state
        return states

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        current = self.module.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [current[name] for name in self.average], 1 - decay)

    def extra_state(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.average = state["average"]

    def pipeline(self) -> Flux2KleinPipeline:
        """Return the pipeline of the averaged weights. It shares the stage's modules, so training must be over."""
        self.module.load_state_dict(self.average)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        return Flux2KleinPipeline(
            scheduler=scheduler,
            vae=self.autoencoder,
            text_encoder=self.text_encoder.eval(),
            tokenizer=self.tokenizer,
            transformer=self.transformer.eval(),
        )


def positions_of(grid: int, first_axis: int) -> Tensor:
    """Return the positions of a square picture's tokens: (grid * grid, 4), with axes picture, row, column, 0."""
    axis = torch.arange(grid)
    return torch.cartesian_prod(torch.tensor([first_axis]), axis, axis, torch.tensor([0]))


def text_positions() -> Tensor:
    zero = torch.tensor([0])
    return torch.cartesian_prod(zero, zero, zero, torch.arange(TEXT_TOKENS))


def random_sigmas(count: int) -> Tensor:
    """Return noise levels in (0, 1): logit-normal (arXiv:2403.03206) with more noise, and a fifth of them uniform."""
    normal = torch.sigmoid(torch.randn(count) + 0.4)
    return torch.where(torch.rand(count) < 0.2, torch.rand(count), normal)


def caption_texts(samples: list[Sample]) -> list[str]:
    """Return the texts from which the tokenizer learns: names, keywords and all words of scene captions."""
    texts = [text for sample in samples for text in (sample.caption, plural(sample.caption), *sample.tags)]
    words: list[str] = [*HUES, *NUMBERS.values(), *OPENINGS, *LOOKS]
    words += [word for relation, _, _ in RELATIONS.values() for word in relation]
    for phrases in (PLACES, LANDSCAPES, TIMES, WEATHERS):
        words += [phrase for group in phrases.values() for phrase in group]
    return [" " + text for text in texts + 20 * words]
