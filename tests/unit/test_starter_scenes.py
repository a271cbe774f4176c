"""Training scenes show what their captions say, and the reference generator trains as its pipeline draws."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from starter.data.corpus import IMAGE_PX, Sample, read_corpus, to_webp
from starter.train.autoencoder import TOKEN_CHANNELS, AutoencoderStage, build_autoencoder, decode, encode
from starter.train.backgrounds import draw_stage
from starter.train.cutouts import HUES, cut_out, recoloured
from starter.train.dataset import to_unit
from starter.train.generator import (
    TEXT_LAYERS,
    TEXT_TOKENS,
    GeneratorStage,
    caption_texts,
    learn_tokenizer,
    positions_of,
    text_positions,
)
from starter.train.loop import Plan, Stage, train
from starter.train.scenes import FULL_SIDE, HALF_SIDE, Scene, SceneMaker

KINDS = [
    (0, FULL_SIDE),
    (1, FULL_SIDE),
    (1, HALF_SIDE),
    (2, FULL_SIDE),
    (4, FULL_SIDE),
    (2, HALF_SIDE),
    (3, HALF_SIDE),
    (4, HALF_SIDE),
]

MAGENTA = (255, 0, 255)

pytestmark = pytest.mark.extended  # it shows nothing about the running service


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(read_corpus())[::40]


@pytest.fixture(scope="module")
def generator(samples: list[Sample]) -> GeneratorStage:
    torch.manual_seed(0)
    tokenizer = learn_tokenizer(caption_texts(samples))
    return GeneratorStage(samples, build_autoencoder().eval(), tokenizer, batch=2)


def scenes(maker: SceneMaker, count: int, side: int, *, number: int = 2) -> list[Scene]:
    rng = random.Random(3)
    return [maker.scene(rng, references=count, side=side) for _ in range(number)]


def magenta_thing(concept: str) -> Sample:
    picture = Image.new("RGB", (IMAGE_PX, IMAGE_PX), "white")
    picture.paste(MAGENTA, (32, 32, 96, 96))
    attributes = {"concept": concept, "split": "train", "group": "objects"}
    return Sample(to_webp(picture), concept, (), "none", "none", attributes)


def shows_the_thing(scene: Scene) -> bool:
    return bool((np.asarray(scene.picture) == MAGENTA).all(axis=2).any())


def assert_learns(stage: Stage, folder: Path, steps: int) -> None:
    train(stage, folder, Plan(steps=steps, warmup=2, log_every=1, bf16=False))
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize(("count", "side"), KINDS)
def test_a_scene_has_the_asked_references_and_none_is_held_out(samples: list[Sample], count: int, side: int) -> None:
    for scene in scenes(SceneMaker(samples), count, side, number=20):
        assert scene.picture.size == (IMAGE_PX, IMAGE_PX)
        assert [reference.side for reference in scene.references] == [side] * count
        assert not any(samples[reference.image].is_held_out for reference in scene.references)
        assert "  " not in scene.caption


def test_the_same_random_numbers_make_the_same_scene(samples: list[Sample]) -> None:
    first, second = (scenes(SceneMaker(samples), 3, HALF_SIDE) for _ in range(2))
    assert [scene.caption for scene in first] == [scene.caption for scene in second]
    assert [scene.picture.tobytes() for scene in first] == [scene.picture.tobytes() for scene in second]


def test_things_without_references_are_not_drawn() -> None:
    """Their places are empty, because a wrong thing would be worse."""
    maker = SceneMaker([magenta_thing("tractor")])
    assert any(map(shows_the_thing, scenes(maker, 1, FULL_SIDE, number=20)))
    made = scenes(maker, 0, FULL_SIDE, number=60)
    assert any("tractor" in scene.caption for scene in made)
    assert not any(map(shows_the_thing, made))


@pytest.mark.parametrize(("colour", "strongest"), [((220, 40, 45), 0), ((75, 160, 65), 1), ((40, 120, 215), 2)])
def test_an_empty_stage_has_a_soft_tone_of_its_tint(colour: tuple[int, int, int], strongest: int) -> None:
    tones = draw_stage(colour).getcolors()
    assert tones is not None
    assert len(tones) == 2  # a wall and a ground
    for _, tone in tones:
        assert isinstance(tone, tuple)
        assert max(range(3), key=lambda channel: tone[channel]) == strongest
        assert min(tone) > 100


@pytest.mark.parametrize(("count", "side"), [(1, FULL_SIDE), (3, FULL_SIDE), (2, HALF_SIDE), (4, HALF_SIDE)])
def test_a_reference_to_the_surroundings_is_not_drawn_as_a_thing(count: int, side: int) -> None:
    white = Sample(to_webp(Image.new("RGB", (IMAGE_PX, IMAGE_PX), "white")), "fog", (), "none", "none", {})
    fog = replace(white, attributes={"concept": "fog", "split": "train", "group": "objects"})
    made = scenes(SceneMaker([magenta_thing("cityscape"), fog]), count, side, number=100)
    of_place = [
        each for each in made if "cityscape" not in each.caption and 0 in {one.image for one in each.references}
    ]
    assert any("city" in scene.caption or "town" in scene.caption for scene in of_place)
    assert not any(map(shows_the_thing, of_place))


def test_a_drawing_is_cut_out_and_its_inner_white_stays() -> None:
    pixels = np.full((40, 40, 3), 255, dtype=np.uint8)
    pixels[10:30, 10:30] = (200, 30, 30)
    pixels[15:25, 15:25] = 255
    drawing = cut_out(pixels)
    assert drawing.size == (40, 40)
    assert drawing.getpixel((20, 20)) == (255, 255, 255, 255)
    canvas = Image.new("RGB", (40, 40), "blue")
    canvas.paste(drawing, mask=drawing)
    assert canvas.getpixel((0, 0)) == (0, 0, 255)
    assert canvas.getpixel((12, 20)) == (200, 30, 30)


@pytest.mark.parametrize(("colour", "strongest"), [("red", 0), ("green", 1), ("blue", 2)])
def test_a_drawing_takes_a_named_colour(colour: str, strongest: int) -> None:
    assert colour in HUES
    drawing = recoloured(Image.new("RGBA", (4, 4), (200, 120, 30, 255)), colour)
    pixel = drawing.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    assert max(range(3), key=lambda channel: pixel[channel]) == strongest


def test_the_autoencoder_learns_and_its_tokens_decode(samples: list[Sample], tmp_path: Path) -> None:
    torch.manual_seed(0)
    stage = AutoencoderStage(samples, batch=4)
    assert_learns(stage, tmp_path, steps=20)
    stage.module.eval()
    images = to_unit(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    tokens = encode(stage.autoencoder, images)
    assert tokens.shape == (1, TOKEN_CHANNELS, 4, 4)
    assert decode(stage.autoencoder, tokens).shape == images.shape


def test_the_reference_generator_learns(generator: GeneratorStage, tmp_path: Path) -> None:
    assert_learns(generator, tmp_path, steps=24)


def test_the_stage_prepares_tokens_as_its_pipeline_does(generator: GeneratorStage) -> None:
    """Otherwise the trained weights would draw something else in the service."""
    pipeline = generator.pipeline()
    made = scenes(generator.scenes, 2, HALF_SIDE)
    clean = generator.encode_pictures(made)
    rows, positions = generator.with_references(clean, positions_of(8, 0), made, HALF_SIDE)
    for row, scene in zip(rows, made, strict=True):
        pixels = [generator.samples[reference.image].pixels(HALF_SIDE) for reference in scene.references]
        images = [pipeline.image_processor.preprocess(Image.fromarray(each)) for each in pixels]
        tokens, ids = pipeline.prepare_image_latents(
            images=images, batch_size=1, generator=None, device="cpu", dtype=torch.float32
        )
        torch.testing.assert_close(row[64:], tokens[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(positions[64:], ids[0])
    captions = ["A dog and a red car", "two cats"]
    states, ids = pipeline.encode_prompt(
        captions, max_sequence_length=TEXT_TOKENS, text_encoder_out_layers=(TEXT_LAYERS,)
    )
    torch.testing.assert_close(generator.encode_text(captions), states, rtol=1e-4, atol=1e-4)
    assert torch.equal(ids[0], text_positions())
