"""Batching changes no image: on small pipelines of the real classes, each row of a batch equals its own alone.

"Equals" means within ROUNDING: a batch of another size runs other kernels, so a float32 model agrees to about 1e-6
before its output is rounded to whole numbers. Images that differ in anything at all differ far more: `distance` of two
of them is above DIFFERENT.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.contracts.generation import Mode
from shared.errors import InvalidOutputError, ModelOutOfMemoryError
from tests.small_pipelines import CLIP_DIM
from worker_service.models.diffusion import Diffusion
from worker_service.models.interface import ImageRequest, Interrupted, OnStep, Reference

ROUNDING = 2
"""Largest difference of one channel of one pixel, of 255."""
DIFFERENT = 10

Loaded = Callable[[str], Diffusion]
PIPELINES = ["sd15", "sdxl", "sdxl_plus", "sdxl_turbo", "flux"]
REQUEST = ImageRequest(
    prompt="a red apple",
    negative_prompt=None,
    seed=7,
    width=64,
    height=64,
    num_inference_steps=3,
    guidance_scale=3.0,
    scheduler=None,
    loras=(),
    mode=Mode.NONE,
    ip_adapter_scale=0.8,
    strength=0.7,
    references=(),
)


def reference(seed: int, *, weight: float = 1.0, caption: str | None = None) -> Reference:
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return Reference(
        vector=rng.normal(size=CLIP_DIM).astype(np.float32),
        image=colours.resize((90, 70), Image.Resampling.NEAREST),
        weight=weight,
        caption=caption or f"memory {seed}",
    )


def draw(model: Diffusion, *requests: ImageRequest) -> list[np.ndarray]:
    return model.generate(requests, lambda step, steps: True)


def noting(told: list[tuple[int, int]], *, until: int = 1000) -> OnStep:
    """An `on_step` that notes what it is told, and stops the call at step `until`."""

    def on_step(step: int, steps: int) -> bool:
        told.append((step, steps))
        return step < until

    return on_step


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def a_mixed_batch(model: Diffusion, *, initial_image: bool, **common: Any) -> list[ImageRequest]:
    """Rows that share nothing that a batch need not share: every mode, other prompts, seeds, references, weights."""
    modes = [Mode(mode) for mode in model.capabilities.modes if Mode(mode).uses_initial_image is initial_image]
    return [
        replace(
            REQUEST,
            prompt=f"picture {row}" + " of many words" * row,
            seed=100 + row,
            mode=mode,
            references=tuple(reference(10 * row + i, weight=1 + i * row) for i in range(1 + row % 3)),
            **common,
        )
        for row, mode in enumerate(modes * 2)
    ]


@pytest.mark.parametrize("guidance_scale", [3.0, 0.0])
@pytest.mark.parametrize("initial_image", [False, True], ids=["from noise", "from an image"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_each_row_of_a_mixed_batch_equals_its_own_alone(
    loaded: Loaded, pipeline: str, initial_image: bool, guidance_scale: float
) -> None:
    model = loaded(pipeline)
    requests = a_mixed_batch(model, initial_image=initial_image, guidance_scale=guidance_scale)
    batched = draw(model, *requests)
    alone = [draw(model, request)[0] for request in requests]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, alone, strict=True)] == [True] * len(requests)
    assert all(distance(a, b) > DIFFERENT for i, a in enumerate(alone) for b in alone[:i])


@pytest.mark.parametrize("pipeline", ["sd15", "sdxl"])
def test_a_row_does_not_depend_on_its_place_or_its_neighbours(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    one, two, three = a_mixed_batch(model, initial_image=False)[:3]
    forward, backward = draw(model, one, two, three), draw(model, three, two, one)
    assert [distance(a, b) <= ROUNDING for a, b in zip(forward, reversed(backward), strict=True)] == [True] * 3


@pytest.mark.parametrize("pipeline", ["sd15", "sdxl"])
def test_negative_prompts_belong_to_their_row(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    requests = [replace(REQUEST, negative_prompt=text) for text in ("blurry", "a photograph of nothing")]
    batched = draw(model, *requests)
    alone = [draw(model, request)[0] for request in requests]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, alone, strict=True)] == [True, True]
    without = draw(model, REQUEST)[0]
    assert all(distance(a, b) > DIFFERENT for a, b in [(alone[0], alone[1]), (alone[0], without)])


@pytest.mark.parametrize("size", [(64, 96), (112, 48)])
def test_a_size_that_is_not_square_is_drawn_with_references(loaded: Loaded, size: tuple[int, int]) -> None:
    model = loaded("sd15")
    requests = a_mixed_batch(model, initial_image=False, width=size[0], height=size[1])
    batched = draw(model, *requests)
    assert {image.shape for image in batched} == {(size[1], size[0], 3)}
    alone = [draw(model, request)[0] for request in requests]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, alone, strict=True)] == [True] * len(requests)


def test_a_seed_draws_the_same_image_again_whatever_torch_drew_in_between(loaded: Loaded) -> None:
    model = loaded("sd15")
    first = draw(model, REQUEST)[0]
    torch.manual_seed(1)
    assert distance(first, draw(model, REQUEST)[0]) == 0
    assert distance(first, draw(model, replace(REQUEST, seed=8))[0]) > DIFFERENT


@pytest.mark.parametrize("pipeline", ["sd15_plain", "sdxl_turbo"])
def test_every_scheduler_draws_the_same_image_batched(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    assert len(model.capabilities.schedulers) >= 10
    for scheduler in [None, *model.capabilities.schedulers]:
        requests = [replace(REQUEST, scheduler=scheduler, seed=seed) for seed in (1, 2)]
        batched, alone = draw(model, *requests), [draw(model, request)[0] for request in requests]
        assert [distance(a, b) <= ROUNDING for a, b in zip(batched, alone, strict=True)] == [True] * 2
        assert distance(*alone) > DIFFERENT


def test_schedulers_are_not_all_the_same(loaded: Loaded) -> None:
    euler, ancestral = (draw(loaded("sd15"), replace(REQUEST, scheduler=name))[0] for name in ("euler", "euler_a"))
    assert distance(euler, ancestral) > DIFFERENT


@pytest.mark.parametrize("mode", [Mode.NONE, Mode.IMG2IMG])
def test_every_scheduler_draws_in_one_step(loaded: Loaded, mode: Mode) -> None:
    model = loaded("sd15_plain")
    for scheduler in [None, *model.capabilities.schedulers]:
        request = replace(REQUEST, mode=mode, references=(reference(1),), scheduler=scheduler, num_inference_steps=1)
        assert draw(model, request)[0].std() > 0


def test_the_models_own_scheduler_is_never_run(loaded: Loaded) -> None:
    model = loaded("sd15")
    before = dict(vars(model.own_scheduler))
    draw(model, REQUEST)
    draw(model, replace(REQUEST, scheduler="dpm++_2m_sde"))
    after = vars(model.own_scheduler)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 128},
        {"height": 128},
        {"num_inference_steps": 4},
        {"guidance_scale": 2.0},
        {"scheduler": "euler"},
        {"loras": (("ink", 0.5),)},
        {"ip_adapter_scale": 0.5},
        {"mode": Mode.IMG2IMG},
        {"mode": Mode.IMG2IMG, "strength": 0.5},
        {"negative_prompt": "blurry"},
    ],
)
def test_what_a_call_has_only_once_separates_batches(loaded: Loaded, change: dict[str, Any]) -> None:
    changed = replace(REQUEST, **change)
    assert changed.batch_key() != REQUEST.batch_key()
    with pytest.raises(ValueError, match="one batch key"):
        draw(loaded("sd15"), REQUEST, changed)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a dog", "seed": 1},
        {"mode": Mode.CAPTION},
        {"mode": Mode.IMAGE_PROMPT, "references": (reference(1),)},
        {"strength": 0.1},  # of no effect without an initial image
        {"negative_prompt": ""},
    ],
)
def test_what_each_row_has_of_its_own_separates_no_batches(change: dict[str, Any]) -> None:
    assert replace(REQUEST, **change).batch_key() == REQUEST.batch_key()


def test_the_order_in_which_loras_are_named_separates_no_batches() -> None:
    one, other = (("ink", 0.5), ("neon", 1.0)), (("neon", 1.0), ("ink", 0.5))
    assert replace(REQUEST, loras=one).batch_key() == replace(REQUEST, loras=other).batch_key()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_step_is_told_with_how_many_there_are(loaded: Loaded, pipeline: str) -> None:
    told: list[tuple[int, int]] = []
    request = replace(REQUEST, num_inference_steps=4, scheduler=None if pipeline == "flux" else "euler")
    loaded(pipeline).generate([request, request], noting(told))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_stopped_call_decodes_nothing_and_leaves_the_model_as_it_was(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    before = draw(model, REQUEST)[0]
    decodes: list[object] = []
    hook = model.text_to_image.vae.decoder.register_forward_hook(lambda *_: decodes.append(1))
    told: list[tuple[int, int]] = []
    with pytest.raises(Interrupted):
        model.generate([REQUEST, REQUEST], noting(told, until=2))
    hook.remove()
    assert [step for step, _ in told] == [1, 2]
    assert decodes == []
    assert distance(draw(model, REQUEST)[0], before) == 0


def test_a_batch_that_does_not_fit_in_memory_says_so_and_the_next_one_runs(loaded: Loaded) -> None:
    model = loaded("sd15")
    before = draw(model, REQUEST)[0]
    with pytest.raises(ModelOutOfMemoryError) as refused:
        draw(model, replace(REQUEST, width=2**22, height=2**22))  # latents of 4 TB
    assert refused.value.context == {"items": 1}
    assert refused.value.__context__ is None, "the first failure would keep the call's tensors alive"
    assert distance(draw(model, REQUEST)[0], before) == 0


def test_a_decoder_that_ran_out_of_memory_in_float32_is_put_back(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL decodes in float32 where half would overflow, and takes it back only when that went well."""
    model = loaded("sdxl")
    vae = model.text_to_image.vae
    before = draw(model, REQUEST)[0]

    def too_large(*_: Any, **__: Any) -> Any:
        vae.to(torch.float64)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(vae, "decode", too_large)
        with pytest.raises(ModelOutOfMemoryError):
            draw(model, REQUEST)
    assert vae.dtype == torch.float32
    assert distance(draw(model, REQUEST)[0], before) == 0


class Looking:
    """Asks to see every second step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, np.ndarray]] = []

    def is_due(self, step: int, total_steps: int) -> bool:
        return step % 2 == 0 and step < total_steps

    def show(self, pixels: np.ndarray, step: int, total_steps: int) -> None:
        self.seen.append((step, pixels))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_who_looks_sees_small_pictures_and_changes_none(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    requests = [replace(REQUEST, num_inference_steps=5, seed=seed, width=320, height=512) for seed in (1, 2, 3)]
    unseen = draw(model, *requests)
    first, third = Looking(), Looking()
    decoded: list[int] = []
    hook = model.text_to_image.vae.decoder.register_forward_hook(lambda _, given, __: decoded.append(len(given[0])))
    seen = draw(model, replace(requests[0], onlooker=first), requests[1], replace(requests[2], onlooker=third))
    hook.remove()
    assert [distance(a, b) for a, b in zip(seen, unseen, strict=True)] == [0, 0, 0]
    assert [step for step, _ in first.seen] == [step for step, _ in third.seen] == [2, 4]
    assert {(picture.shape, picture.dtype.name) for _, picture in first.seen} == {((256, 160, 3), "uint8")}
    assert distance(first.seen[0][1], third.seen[0][1]) > DIFFERENT, "each its own"
    assert decoded == [2, 2, 3], "nothing is decoded for those who did not ask"


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [("sd15", "euler"), ("sd15", "dpm++_2m"), ("sd15", "unipc"), ("flux", None)]
)
def test_a_preview_shows_what_the_image_becomes(loaded: Loaded, pipeline: str, scheduler: str | None) -> None:
    model, looking = loaded(pipeline), Looking()
    (image,) = draw(model, replace(REQUEST, num_inference_steps=11, scheduler=scheduler, onlooker=looking))

    def away(picture: np.ndarray) -> float:
        return float(np.abs(picture.astype(int) - image).mean())

    assert looking.seen[-1][0] == 10
    assert away(looking.seen[-1][1]) < away(looking.seen[0][1])


def test_a_preview_that_does_not_fit_in_memory_harms_nothing(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, looking = loaded("sd15"), Looking()
    before = draw(model, REQUEST)[0]
    decode = model.text_to_image.vae.decode
    calls: list[int] = []

    def narrow(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return decode(*arguments, **options)

    monkeypatch.setattr(model.text_to_image.vae, "decode", narrow)
    request = replace(REQUEST, onlooker=looking)
    assert distance(draw(model, request)[0], before) == 0
    assert looking.seen == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_no_numbers_are_no_image(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    model = loaded("sd15")
    forward = model.text_to_image.unet.forward

    def broken(*arguments: Any, **options: Any) -> Any:
        return (torch.full_like(forward(*arguments, **options)[0], value),)

    monkeypatch.setattr(model.text_to_image.unet, "forward", broken)
    decodes: list[object] = []
    hook = model.text_to_image.vae.decoder.register_forward_hook(lambda *_: decodes.append(1))
    with pytest.raises(InvalidOutputError):
        draw(model, REQUEST)
    hook.remove()
    assert decodes == [], "a decoder may make a picture of them"


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_memory_savers_are_what_the_vae_can_do_and_end_with_the_call(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    vae = model.text_to_image.vae
    before = draw(model, REQUEST)[0]
    assert model.memory_savers(2) == ["vae_slicing"]
    assert model.memory_savers(1) == ["vae_tiling"]
    with model.saving_memory(["vae_slicing", "vae_tiling"]):
        assert vae.use_slicing
        assert vae.use_tiling
        draw(model, REQUEST, REQUEST)
    assert not vae.use_slicing
    assert not vae.use_tiling
    assert distance(draw(model, REQUEST)[0], before) == 0
