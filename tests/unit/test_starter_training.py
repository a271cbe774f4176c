"""The starter's training scripts learn, resume exactly and export models that the product loads. Tiny models."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import nn
from transformers import CLIPTokenizer

from starter.train import loop
from starter.train.adapter import OneProductAttention, conditioning, join_adapter, split_adapter
from starter.train.autoencoder import AutoencoderStage
from starter.train.clip import ClipShape, ClipStage, encode_text, image_vectors, tokenize
from starter.train.dataset import Dataset, load_dataset, to_unit
from starter.train.export import export_clip, export_generator
from starter.train.generator import LATENT_PX, REFERENCES, GeneratorStage
from starter.train.loop import Plan, Stage, train
from starter.train.optimizer import MuonWithAdamW, as_matrix
from starter.train.plot import plot_losses
from starter.train.queries import QueryStage
from starter.train.texts import vocabulary_texts
from starter.train.tokens import END, PAD, learn_tokenizer

IMAGES = 30
SHAPE = ClipShape(embed_dim=32, width=32, layers=2, head_width=16, text_width=32, text_heads=2, text_layers=2)
PLAN = Plan(steps=12, warmup=2, log_every=1, bf16=False)

pytestmark = pytest.mark.extended  # it shows nothing about the running service


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(limit=IMAGES)


@pytest.fixture(scope="module")
def tokenizer(dataset: Dataset) -> CLIPTokenizer:
    return learn_tokenizer(vocabulary_texts(dataset.samples), vocab_size=900)


def small_clip(dataset: Dataset, tokenizer: CLIPTokenizer) -> ClipStage:
    torch.manual_seed(0)
    return ClipStage(dataset, tokenizer, SHAPE, batch=8, learning_rate=3e-3)


def small_autoencoder(dataset: Dataset) -> AutoencoderStage:
    torch.manual_seed(0)
    return AutoencoderStage(dataset, channels=8, batch=4, learning_rate=5e-3)


def small_generator(dataset: Dataset, tokenizer: CLIPTokenizer) -> GeneratorStage:
    clip, autoencoder = small_clip(dataset, tokenizer), small_autoencoder(dataset)
    return GeneratorStage(
        dataset, clip.module, tokenizer, autoencoder.module, batch=8, learning_rate=2e-3, widths=(16, 32, 32)
    )


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / loop.LOG).read_text().splitlines()]


def assert_learns(stage: Stage, folder: Path, steps: int) -> None:
    assert train(stage, folder, replace(PLAN, steps=steps)) == steps
    found = losses(folder)
    assert len(found) == steps
    quarter = steps // 4
    assert sum(found[-quarter:]) < 0.9 * sum(found[:quarter]), found


def test_the_tokenizer_pads_with_zero_and_ends_with_its_highest_id(tokenizer: CLIPTokenizer) -> None:
    ids = tokenize(tokenizer, ["grinning face", "zxqv"])
    assert tokenizer.convert_tokens_to_ids(PAD) == 0
    assert ids.max() == tokenizer.convert_tokens_to_ids(END) == len(tokenizer) - 1
    assert (ids == ids.max()).sum(dim=1).tolist() == [1, 1]


def test_clip_learns_and_its_folder_loads_through_open_clip(
    dataset: Dataset, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    stage = small_clip(dataset, tokenizer)
    assert_learns(stage, tmp_path / "clip", steps=16)
    stage.module.eval()
    export_clip(stage.module, SHAPE, tokenizer, tmp_path / "export")

    model = open_clip.create_model(f"local-dir:{tmp_path / 'export'}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}")(["grinning face", "cat"])
    with torch.no_grad():
        assert torch.equal(ids, tokenize(tokenizer, ["grinning face", "cat"]))
        torch.testing.assert_close(model.encode_text(ids), encode_text(stage.module, ids), atol=0.02, rtol=0.02)
        images = to_unit(dataset.pixels[:2])
        ours: Any = stage.module
        torch.testing.assert_close(model.encode_image(images), ours.encode_image(images), atol=0.02, rtol=0.02)


def test_queries_train_the_text_tower_and_keep_the_image_vectors(
    dataset: Dataset, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    clip = small_clip(dataset, tokenizer).module
    before = image_vectors(clip, dataset.pixels)
    assert_learns(QueryStage(dataset, clip, tokenizer, batch=16, learning_rate=1e-2), tmp_path, steps=24)
    assert torch.equal(image_vectors(clip, dataset.pixels), before)


def test_the_autoencoder_learns(dataset: Dataset, tmp_path: Path) -> None:
    assert_learns(small_autoencoder(dataset), tmp_path, steps=32)
    assert plot_losses(tmp_path).stat().st_size > 0


def test_a_killed_run_resumes_exactly_from_its_checkpoint(dataset: Dataset, tmp_path: Path) -> None:
    whole, halves = small_autoencoder(dataset), small_autoencoder(dataset)
    train(whole, tmp_path / "whole", replace(PLAN, steps=6))
    train(halves, tmp_path / "halves", replace(PLAN, steps=3))
    resumed = AutoencoderStage(dataset, channels=8, batch=4, learning_rate=5e-3)
    assert train(resumed, tmp_path / "halves", replace(PLAN, steps=6)) == 6
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


def test_a_cool_down_does_not_change_the_checkpoint(dataset: Dataset, tmp_path: Path) -> None:
    stage = small_autoencoder(dataset)
    train(stage, tmp_path, replace(PLAN, steps=3))
    train(stage, tmp_path, replace(PLAN, steps=3, cooldown=2))
    assert torch.load(tmp_path / loop.CHECKPOINT, weights_only=True)["step"] == 3
    assert torch.load(tmp_path / loop.COOLED, weights_only=True)["step"] == 5
    assert loop.best_checkpoint(tmp_path).name == loop.COOLED


def test_the_generator_learns_and_its_folder_loads_through_diffusers(
    dataset: Dataset, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    stage = small_generator(dataset, tokenizer)
    assert_learns(stage, tmp_path / "generator", steps=24)
    folder = tmp_path / "export"
    export_generator(stage, folder)

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.load_ip_adapter(
        folder, subfolder="ip_adapter", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    pipeline.set_ip_adapter_scale(1.0)
    pipeline.set_progress_bar_config(disable=True)
    vectors = torch.randn(2, REFERENCES, SHAPE.embed_dim)
    weights = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    vectors[0, 2:] = 0
    both = generate_images(pipeline, ["cat", "robot"], vectors, weights, seeds=[1, 2])
    assert both.shape == (2, 3, 64, 64)
    single = generate_images(pipeline, ["robot"], vectors[1:], weights[1:], seeds=[2])
    torch.testing.assert_close(single, both[1:], atol=1e-3, rtol=0)
    without = generate_images(pipeline, ["robot"], torch.zeros_like(vectors[1:]), torch.zeros(1, REFERENCES), seeds=[2])
    assert (without - single).abs().max() > 1e-5


def test_the_exported_unet_and_adapter_can_be_joined_again(dataset: Dataset, tokenizer: CLIPTokenizer) -> None:
    stage = small_generator(dataset, tokenizer)
    together = join_adapter(*split_adapter(stage.average, stage.unet), stage.unet)
    assert together.keys() == stage.average.keys()
    assert all(torch.equal(together[name], value) for name, value in stage.average.items())


def test_convolution_kernels_are_trained_as_matrices_in_place() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(16, 16, 3).to(memory_format=torch.channels_last)
    optimizer = MuonWithAdamW(module, learning_rate=1e-2, weight_decay=0.0, betas=(0.9, 0.99))
    before = module.weight.detach().clone()
    module(1 + 0.3 * torch.randn(4, 16, 5, 5)).square().mean().backward()  # one direction dominates the gradient
    optimizer.step()
    step = as_matrix(module.weight.detach() - before)
    assert torch.linalg.cond(step) < 5, "the update is about equally large in all directions"


def test_convolution_kernels_that_need_a_copy_are_refused() -> None:
    with pytest.raises(ValueError, match="channels_last"):
        MuonWithAdamW(nn.Conv2d(16, 16, 3), learning_rate=1e-2, weight_decay=0.0, betas=(0.9, 0.99))


def generate_images(
    pipeline: Any, prompts: list[str], vectors: torch.Tensor, weights: torch.Tensor, *, seeds: list[int]
) -> torch.Tensor:
    """Generate as the service does. The pipeline would repeat the rows of `vectors`, so that step is replaced."""
    embeds = torch.cat([torch.zeros_like(vectors), vectors])
    masks = torch.cat([torch.zeros_like(weights), weights])[:, :, None, None].expand(-1, -1, LATENT_PX, LATENT_PX)
    pipeline.prepare_ip_adapter_image_embeds = lambda *_, **__: [embeds]
    images: torch.Tensor = pipeline(
        prompt=prompts,
        num_inference_steps=3,
        guidance_scale=2.0,
        ip_adapter_image_embeds=[embeds],
        cross_attention_kwargs={"ip_adapter_masks": [masks]},
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return images


def test_conditioning_does_not_mix_rows(dataset: Dataset, tokenizer: CLIPTokenizer) -> None:
    stage = small_generator(dataset, tokenizer)
    unet = stage.module.eval()
    vectors, weights = torch.randn(3, REFERENCES, SHAPE.embed_dim), torch.rand(3, REFERENCES)
    latents, times = torch.randn(3, 4, LATENT_PX, LATENT_PX), torch.full((3,), 500)
    states = stage.encode_prompts(["cat", "robot", ""])
    with torch.no_grad():
        together = unet(latents, times, states, **conditioning(vectors, weights, LATENT_PX)).sample
        single = unet(latents[1:2], times[1:2], states[1:2], **conditioning(vectors[1:2], weights[1:2], 64)).sample
    torch.testing.assert_close(single, together[1:2], atol=1e-4, rtol=1e-4)


def test_attention_in_training_equals_that_of_diffusers(dataset: Dataset, tokenizer: CLIPTokenizer) -> None:
    stage = small_generator(dataset, tokenizer)
    unet: Any = stage.module.eval()
    inputs = (torch.randn(2, 4, LATENT_PX, LATENT_PX), torch.tensor([10, 700]), stage.encode_prompts(["cat", "robot"]))
    given = conditioning(torch.randn(2, REFERENCES, SHAPE.embed_dim), torch.rand(2, REFERENCES), LATENT_PX)
    with torch.no_grad():
        ours = unet(*inputs, **given).sample
        for processor in unet.attn_processors.values():
            if isinstance(processor, OneProductAttention):
                processor.__class__ = IPAdapterAttnProcessor2_0
        torch.testing.assert_close(ours, unet(*inputs, **given).sample, atol=1e-5, rtol=1e-4)


def test_held_out_concepts_never_reach_the_generator(dataset: Dataset, tokenizer: CLIPTokenizer) -> None:
    held_out = dataset.concept == 3
    stage = small_generator(replace(dataset, held_out=held_out), tokenizer)
    assert len(stage.latents) == len(stage.samples) == len(stage.vectors) == (~held_out).sum() < IMAGES
    assert dataset.names[3] not in {sample.concept for sample in stage.samples}
