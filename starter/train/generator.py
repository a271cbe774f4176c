"""The generator: a latent diffusion UNet and its IP-Adapter, trained jointly from scratch on retrieved neighbours.

The conditions are those of the service: K = 4 reference slots, un-normalised CLIP image vectors, and a weight per
reference in the attention masks. For half of the samples, the caption's text vector retrieves the references.
"""

import random
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from starter.train.adapter import add_fresh_adapter, attend_in_one_product, conditioning
from starter.train.clip import tokenize
from starter.train.dataset import Dataset, to_unit
from starter.train.loop import autocast
from starter.train.optimizer import MuonWithAdamW, Optimizer
from starter.train.texts import main_colours, random_caption
from starter.train.tokens import CONTEXT_LENGTH

LATENT_PX = 16
WIDTHS = (96, 128, 208)
REFERENCES = 4
CANDIDATES = 8
MAX_SNR = 5.0
"""Nearly clean images have less weight in the loss, as in min-SNR weighting (arXiv:2303.09556). Unlike there, nearly
pure noise has full weight. At this size it decides the whole outline, which stayed a blob with min-SNR weights."""

NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,  # required by StableDiffusionPipeline; trailing timesteps do not use it
}


def build_unet(cross_attention_dim: int, embed_dim: int, widths: tuple[int, int, int] = WIDTHS) -> UNet2DConditionModel:
    """Build an untrained UNet for 16 x 16 x 4 latents with an untrained IP-Adapter.

    It has attention only at 8 x 8 and 4 x 4, where it is cheap. The pooled text is also added to the time embedding,
    which scales and shifts the features of every residual block (FiLM, arXiv:1709.07871). With attention alone a small
    UNet learned very slowly to follow the text.
    """
    unet = UNet2DConditionModel(
        sample_size=LATENT_PX,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,  # the number of heads: the name is a known error in diffusers
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    add_fresh_adapter(unet, embed_dim)
    return unet.to(memory_format=torch.channels_last)


def sampling_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**NOISE_SCHEDULE, algorithm_type="dpmsolver++", solver_order=2)


def text_encoder_from_clip(clip: Any, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Convert the text tower of an open_clip model to a transformers CLIPTextModel with the same weights.

    Raises:
        ValueError: the weights do not fit the model.
    """
    blocks = clip.transformer.resblocks
    width: int = clip.ln_final.weight.shape[0]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.weight.shape[0],
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="gelu",
        projection_dim=clip.text_projection.shape[1],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = CLIPTextModel(config)
    state = {
        "embeddings.token_embedding.weight": clip.token_embedding.weight,
        "embeddings.position_embedding.weight": clip.positional_embedding,
        "final_layer_norm.weight": clip.ln_final.weight,
        "final_layer_norm.bias": clip.ln_final.bias,
    }
    for index, block in enumerate(blocks):
        here = f"encoder.layers.{index}"
        for kind in ("weight", "bias"):
            projections = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            for name, value in zip("qkv", projections, strict=True):
                state[f"{here}.self_attn.{name}_proj.{kind}"] = value
            state[f"{here}.self_attn.out_proj.{kind}"] = getattr(block.attn.out_proj, kind)
            state[f"{here}.layer_norm1.{kind}"] = getattr(block.ln_1, kind)
            state[f"{here}.layer_norm2.{kind}"] = getattr(block.ln_2, kind)
            state[f"{here}.mlp.fc1.{kind}"] = getattr(block.mlp.c_fc, kind)
            state[f"{here}.mlp.fc2.{kind}"] = getattr(block.mlp.c_proj, kind)
    missing, unexpected = model.load_state_dict(
        {key: value.detach().clone() for key, value in state.items()}, strict=False
    )
    if unexpected or any("position_ids" not in key for key in missing):
        raise ValueError(f"the text tower does not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()


class GeneratorStage:
    """Trains by v-prediction on cached latents, and keeps a running average of the weights."""

    name = "generator"
    weight_decay = 0.01
    betas = (0.9, 0.99)
    ema_decay = 0.9995
    drop_text = 0.25
    drop_references = 0.20
    drop_both = 0.08
    self_reference = 0.5
    random_reference = 0.15
    vector_noise = 0.20

    def __init__(
        self,
        dataset: Dataset,
        clip: nn.Module,
        tokenizer: CLIPTokenizer,
        autoencoder: AutoencoderTiny,
        *,
        batch: int = 64,
        learning_rate: float = 4e-4,
        widths: tuple[int, int, int] = WIDTHS,
        compiled: bool = False,
    ) -> None:
        kept = (~dataset.held_out).nonzero().flatten()
        self.samples = [dataset.samples[index] for index in kept.tolist()]
        pixels = dataset.pixels[kept]
        self.colours = [main_colours(image) for image in pixels]
        self.clip: Any = clip.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder_from_clip(clip, tokenizer).requires_grad_(False)
        self.latents, self.vectors = encode_images(pixels, clip, autoencoder)
        self.units = F.normalize(self.vectors, dim=-1)
        unet = build_unet(self.text_encoder.config.hidden_size, self.vectors.shape[1], widths)
        attend_in_one_product(unet)
        self.unet = unet
        self.module: nn.Module = unet
        self.forward: Any = torch.compile(unet, dynamic=False) if compiled else unet
        self.average = {name: value.detach().clone() for name, value in unet.state_dict().items()}
        self.scheduler = DDPMScheduler(**NOISE_SCHEDULE)
        self.snr = signal_to_noise(self.scheduler)
        self.batch = batch
        self.learning_rate = learning_rate
        self.encoders = torch.cat([self.latents.flatten(1).mean(1)[:64], self.vectors.mean(1)[:64]])
        self.no_text = self.encode_prompts([""])[0]

    def optimizer(self) -> Optimizer:
        return MuonWithAdamW(
            self.module, learning_rate=self.learning_rate, weight_decay=self.weight_decay, betas=self.betas
        )

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(int(torch.randint(2**31, ()).item()))
        chosen = torch.randint(len(self.latents), (self.batch,))
        states, vectors, weights = self.condition(chosen, rng)
        latents = self.latents[chosen]
        noise = torch.randn_like(latents)
        times = random_timesteps(self.batch)
        noisy = self.scheduler.add_noise(latents, noise, times)
        target = self.scheduler.get_velocity(latents, noise, times)
        predicted = self.forward(noisy, times, states, **conditioning(vectors, weights, LATENT_PX)).sample.float()
        error = F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
        snr = self.snr[times]
        loss = (error * ((MAX_SNR + 1) / (snr + 1)).clamp(max=1)).mean()
        return loss, {"v_error": error.mean().item()}

    @torch.no_grad()
    def condition(self, chosen: Tensor, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """Return text states (B, T, D), reference vectors (B, K, E) and weights (B, K) for the images `chosen`."""
        captions = [random_caption(self.samples[i], self.colours[i], rng) for i in chosen.tolist()]
        ids = tokenize(self.tokenizer, captions)
        states = self.text_encoder(ids).last_hidden_state.float()
        ends = states[torch.arange(len(ids)), ids.argmax(dim=1)]
        text_vectors = F.normalize(
            ends @ self.clip.text_projection, dim=-1
        )  # equals CLIP's text vector, because the tower is the same
        by_image = torch.rand(len(chosen), 1) < 0.5
        similarity = torch.where(by_image, self.units[chosen], text_vectors) @ self.units.T
        not_itself = torch.rand(len(chosen)) >= self.self_reference
        similarity[not_itself, chosen[not_itself]] = -2
        nearest = similarity.topk(CANDIDATES, dim=1)
        vectors = torch.zeros(len(chosen), REFERENCES, self.vectors.shape[1])
        weights = torch.zeros(len(chosen), REFERENCES)
        for row in range(len(chosen)):
            kind = rng.random()
            without_text = kind < self.drop_text or kind > 1 - self.drop_both
            if without_text:
                states[row] = self.no_text
            if kind > 1 - self.drop_both - self.drop_references:
                if rng.random() < 0.5:  # a pipeline's negative rows may have weights with zero vectors
                    weights[row] = random_weights(REFERENCES, torch.zeros(REFERENCES), rng)
                continue
            count = rng.choices((1, 2, 3, 4), (0.15, 0.15, 0.2, 0.5))[0]
            ranks = range(count) if rng.random() < 0.7 else sorted(rng.sample(range(CANDIDATES), count))
            used = nearest.indices[row, list(ranks)]
            if rng.random() < self.random_reference and count > 1:
                used[rng.randrange(count)] = rng.randrange(len(self.vectors))
            vectors[row, :count] = self.vectors[used]
            weights[row, :count] = random_weights(count, similarity[row, used], rng)
        length = vectors.norm(dim=-1, keepdim=True)
        vectors += self.vector_noise * length * torch.randn_like(vectors) / vectors.shape[-1] ** 0.5
        return states, vectors, weights

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        states: Tensor = self.text_encoder(tokenize(self.tokenizer, prompts)).last_hidden_state
        return states.float()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        current = self.module.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [current[name] for name in self.average], 1 - decay)

    def extra_state(self) -> dict[str, Any]:
        return {"average": self.average, "encoders": self.encoders}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if not torch.allclose(state.get("encoders", self.encoders), self.encoders, rtol=0.01, atol=0.01):
            raise ValueError("CLIP or the autoencoder has changed since the training of this generator started")
        self.average = state["average"]


@torch.no_grad()
def encode_images(pixels: Tensor, clip: Any, autoencoder: AutoencoderTiny) -> tuple[Tensor, Tensor]:
    """Return scaled latents (N, 4, S/4, S/4) and un-normalised CLIP vectors (N, E), both float32.

    pixels: uint8 (N, 3, S, S).
    """
    latents, vectors = [], []
    for batch in torch.split(pixels, 64):
        images = to_unit(batch)
        with autocast(None):
            latents.append(autoencoder.encode(images).latents.float() * autoencoder.config.scaling_factor)
        vectors.append(clip.encode_image(images))
    return torch.cat(latents).contiguous(memory_format=torch.channels_last), torch.cat(vectors)


def random_timesteps(count: int) -> Tensor:
    """Return timesteps, int64 (count,): three quarters of them from the noisiest 30 %, which decide the outline.

    Measured after 150,000 samples: below t = 600 the error is the same with and without conditions (0.19 at t = 400).
    It hardly decreases any more. At t = 999 an image's own text and vector explain 42 % of it, with a rising share.
    """
    anywhere = torch.randint(1000, (count,))
    noisiest = torch.randint(700, 1000, (count,))
    return torch.where(torch.rand(count) < 0.75, noisiest, anywhere)


def random_weights(count: int, similarity: Tensor, rng: random.Random) -> Tensor:
    """Return weights that sum to 1: equal, a softmax of the similarities at a random temperature, or Dirichlet."""
    kind = rng.random()
    if kind < 0.4:
        return torch.full((count,), 1 / count)
    if kind < 0.7:
        return torch.softmax(similarity[:count] / rng.choice((0.02, 0.05, 0.1, 0.2)), dim=0)
    drawn = torch.tensor([rng.gammavariate(1.0, 1.0) + 1e-3 for _ in range(count)])
    return drawn / drawn.sum()


def signal_to_noise(scheduler: DDPMScheduler) -> Tensor:
    """Return the SNR of each timestep: alpha_bar / (1 - alpha_bar)."""
    alpha_bar: Tensor = scheduler.alphas_cumprod
    return alpha_bar / (1 - alpha_bar)
