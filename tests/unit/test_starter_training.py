"""The starter's training scripts learn, resume exactly and export models that the product loads. Tiny models."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from starter.train import loop
from starter.train.autoencoder import AutoencoderStage
from starter.train.clip import ClipShape, ClipStage, encode_text, image_vectors, tokenize
from starter.train.dataset import Dataset, load_dataset, to_unit
from starter.train.export import export_clip
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
    return AutoencoderStage(dataset.samples, batch=4)


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
    assert plot_losses(tmp_path / "clip").stat().st_size > 0
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


def test_a_killed_run_resumes_exactly_from_its_checkpoint(dataset: Dataset, tmp_path: Path) -> None:
    whole, halves = small_autoencoder(dataset), small_autoencoder(dataset)
    train(whole, tmp_path / "whole", replace(PLAN, steps=6))
    train(halves, tmp_path / "halves", replace(PLAN, steps=3))
    resumed = AutoencoderStage(dataset.samples, batch=4)
    assert train(resumed, tmp_path / "halves", replace(PLAN, steps=6)) == 6
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


def test_a_checkpoint_has_small_parts_and_survives_a_kill_while_it_is_replaced(
    dataset: Dataset, tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PART_BYTES", 50_000)
    train(small_clip(dataset, tokenizer), tmp_path, replace(PLAN, steps=1))
    checkpoint = tmp_path / loop.CHECKPOINT
    sizes = [part.stat().st_size for part in checkpoint.iterdir()]
    assert len(sizes) > 2
    assert max(sizes) == 50_000

    checkpoint.rename(tmp_path / "checkpoint.old")  # the new folder has not yet taken its place
    assert train(small_clip(dataset, tokenizer), tmp_path, replace(PLAN, steps=2)) == 2
    assert len((tmp_path / loop.LOG).read_text().splitlines()) == 2, "the second run went on"


def test_a_cool_down_does_not_change_the_checkpoint(dataset: Dataset, tmp_path: Path) -> None:
    stage = small_autoencoder(dataset)
    train(stage, tmp_path, replace(PLAN, steps=3))
    train(stage, tmp_path, replace(PLAN, steps=3, cooldown=2))
    assert loop.read_checkpoint(tmp_path / loop.CHECKPOINT)["step"] == 3
    assert loop.read_checkpoint(tmp_path / loop.COOLED)["step"] == 5
    assert loop.best_checkpoint(tmp_path).name == loop.COOLED


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
