"""Batching changes no image: each row of a batch equals the image of the same request in a batch of one.

The pipelines are small ones of the real classes. "Equals" means within ROUNDING. Batches of different sizes run
different kernels, so the results of a float32 model agree to about 1e-6 before they are rounded to whole numbers.
Images of different requests differ far more: their `distance` is above DIFFERENT.
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
from tests.image_request import IMAGE_REQUEST
from tests.small_pipelines import CLIP_DIM
from worker_service.execution.steps import CallStopped, OnStep
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.interface import ImageRequest, Reference

ROUNDING = 2
"""Largest difference of one channel of one pixel, of 255."""
DIFFERENT = 10

Loaded = Callable[[str], Diffusion]
PIPELINES = ["sd15", "sdxl", "sdxl_plus", "sdxl_turbo", "flux"]
REQUEST = replace(IMAGE_REQUEST, num_inference_steps=3)


def reference(seed: int, *, weight: float = 1.0, caption: str | None = None) -> Reference:
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return Reference(
        vector=rng.normal(size=CLIP_DIM).astype(np.float32),
        image=colours.resize((90, 70), Image.Resampling.NEAREST),
        weight=weight,
        caption=caption or f"memory {seed}",
    )


def generate_images(model: Diffusion, *requests: ImageRequest) -> list[np.ndarray]:
    return model.generate(requests, lambda step, steps: True)


def record_steps(reported: list[tuple[int, int]], *, until: int = 1000) -> OnStep:
    """An `on_step` that records its arguments, and stops the call at step `until`."""

    def on_step(step: int, steps: int) -> bool:
        reported.append((step, steps))
        return step < until

    return on_step


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def mixed_batch(model: Diffusion, *, initial_image: bool, **common: Any) -> list[ImageRequest]:
    """Requests that differ in all that may differ in a batch: mode, prompt, seed, references and weights."""
    modes = [Mode(mode) for mode in model.capabilities.modes if Mode(mode).traits.uses_initial_image is initial_image]
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
def test_each_row_of_a_mixed_batch_equals_its_image_in_a_batch_of_one(
    loaded: Loaded, pipeline: str, initial_image: bool, guidance_scale: float
) -> None:
    model = loaded(pipeline)
    requests = mixed_batch(model, initial_image=initial_image, guidance_scale=guidance_scale)
    batched = generate_images(model, *requests)
    single = [generate_images(model, request)[0] for request in requests]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, single, strict=True)] == [True] * len(requests)
    assert all(distance(a, b) > DIFFERENT for i, a in enumerate(single) for b in single[:i])


@pytest.mark.parametrize("pipeline", ["sd15", "sdxl"])
def test_a_row_does_not_depend_on_its_position_or_the_other_rows(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    one, two, three = mixed_batch(model, initial_image=False)[:3]
    forward, backward = generate_images(model, one, two, three), generate_images(model, three, two, one)
    assert [distance(a, b) <= ROUNDING for a, b in zip(forward, reversed(backward), strict=True)] == [True] * 3


@pytest.mark.parametrize("pipeline", ["sd15", "sdxl"])
def test_each_row_has_its_own_negative_prompt(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    requests = [replace(REQUEST, negative_prompt=text) for text in ("blurry", "a photograph of nothing")]
    batched = generate_images(model, *requests)
    single = [generate_images(model, request)[0] for request in requests]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, single, strict=True)] == [True, True]
    without = generate_images(model, REQUEST)[0]
    assert all(distance(a, b) > DIFFERENT for a, b in [(single[0], single[1]), (single[0], without)])


@pytest.mark.parametrize("size", [(64, 96), (112, 48)])
def test_an_image_that_is_not_square_can_have_references(loaded: Loaded, size: tuple[int, int]) -> None:
    model = loaded("sd15")
    requests = mixed_batch(model, initial_image=False, width=size[0], height=size[1])
    batched = generate_images(model, *requests)
    assert {image.shape for image in batched} == {(size[1], size[0], 3)}
    single = [generate_images(model, request)[0] for request in requests]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, single, strict=True)] == [True] * len(requests)


def test_a_seed_gives_the_same_image_whatever_the_global_seed_of_torch_is(loaded: Loaded) -> None:
    model = loaded("sd15")
    first = generate_images(model, REQUEST)[0]
    torch.manual_seed(1)
    assert distance(first, generate_images(model, REQUEST)[0]) == 0
    assert distance(first, generate_images(model, replace(REQUEST, seed=8))[0]) > DIFFERENT


@pytest.mark.parametrize("pipeline", ["sd15_plain", "sdxl_turbo"])
def test_every_scheduler_gives_the_same_image_in_a_batch(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    assert len(model.capabilities.schedulers) >= 10
    for scheduler in [None, *model.capabilities.schedulers]:
        requests = [replace(REQUEST, scheduler=scheduler, seed=seed) for seed in (1, 2)]
        batched = generate_images(model, *requests)
        single = [generate_images(model, request)[0] for request in requests]
        assert [distance(a, b) <= ROUNDING for a, b in zip(batched, single, strict=True)] == [True] * 2
        assert distance(*single) > DIFFERENT


def test_different_schedulers_give_different_images(loaded: Loaded) -> None:
    euler, ancestral = (
        generate_images(loaded("sd15"), replace(REQUEST, scheduler=name))[0] for name in ("euler", "euler_a")
    )
    assert distance(euler, ancestral) > DIFFERENT


@pytest.mark.parametrize("mode", [Mode.NONE, Mode.IMG2IMG])
def test_every_scheduler_can_run_a_single_step(loaded: Loaded, mode: Mode) -> None:
    model = loaded("sd15_plain")
    for scheduler in [None, *model.capabilities.schedulers]:
        request = replace(REQUEST, mode=mode, references=(reference(1),), scheduler=scheduler, num_inference_steps=1)
        assert generate_images(model, request)[0].std() > 0


def test_a_call_does_not_change_the_models_own_scheduler(loaded: Loaded) -> None:
    model = loaded("sd15")
    before = dict(vars(model.own_scheduler))
    generate_images(model, REQUEST)
    generate_images(model, replace(REQUEST, scheduler="dpm++_2m_sde"))
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
def test_parameters_of_the_whole_call_separate_batches(loaded: Loaded, change: dict[str, Any]) -> None:
    changed = replace(REQUEST, **change)
    assert changed.batch_key() != REQUEST.batch_key()
    with pytest.raises(ValueError, match="equal batch keys"):
        generate_images(loaded("sd15"), REQUEST, changed)


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
def test_parameters_of_a_single_row_do_not_separate_batches(change: dict[str, Any]) -> None:
    assert replace(REQUEST, **change).batch_key() == REQUEST.batch_key()


def test_the_order_of_loras_does_not_separate_batches() -> None:
    one, other = (("ink", 0.5), ("neon", 1.0)), (("neon", 1.0), ("ink", 0.5))
    assert replace(REQUEST, loras=one).batch_key() == replace(REQUEST, loras=other).batch_key()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_step_is_reported_with_the_number_of_steps(loaded: Loaded, pipeline: str) -> None:
    reported: list[tuple[int, int]] = []
    request = replace(REQUEST, num_inference_steps=4, scheduler=None if pipeline == "flux" else "euler")
    loaded(pipeline).generate([request, request], record_steps(reported))
    assert reported == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_an_interrupted_call_decodes_nothing_and_leaves_the_model_unchanged(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    before = generate_images(model, REQUEST)[0]
    decodes: list[object] = []
    hook = model.text_to_image.vae.decoder.register_forward_hook(lambda *_: decodes.append(1))
    reported: list[tuple[int, int]] = []
    with pytest.raises(CallStopped):
        model.generate([REQUEST, REQUEST], record_steps(reported, until=2))
    hook.remove()
    assert [step for step, _ in reported] == [1, 2]
    assert decodes == []
    assert distance(generate_images(model, REQUEST)[0], before) == 0


def test_a_batch_that_does_not_fit_in_memory_is_an_error_and_the_next_one_runs(loaded: Loaded) -> None:
    model = loaded("sd15")
    before = generate_images(model, REQUEST)[0]
    with pytest.raises(ModelOutOfMemoryError) as refused:
        generate_images(model, replace(REQUEST, width=2**22, height=2**22))  # latents of 4 TB
    assert refused.value.context == {"items": 1}
    assert refused.value.__context__ is None, "a chained exception would keep the call's tensors alive"
    assert distance(generate_images(model, REQUEST)[0], before) == 0


def test_the_decoder_gets_its_dtype_back_after_it_ran_out_of_memory(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers decodes SDXL in float32, because half precision overflows, and restores the dtype only on success."""
    model = loaded("sdxl")
    vae = model.text_to_image.vae
    before = generate_images(model, REQUEST)[0]

    def too_large(*_: Any, **__: Any) -> Any:
        vae.to(torch.float64)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(vae, "decode", too_large)
        with pytest.raises(ModelOutOfMemoryError):
            generate_images(model, REQUEST)
    assert vae.dtype == torch.float32
    assert distance(generate_images(model, REQUEST)[0], before) == 0


class PreviewRecorder:
    """A preview listener that asks for every second step and records the previews."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, np.ndarray]] = []

    def is_due(self, step: int, total_steps: int) -> bool:
        return step % 2 == 0 and step < total_steps

    def show(self, pixels: np.ndarray, step: int, total_steps: int) -> None:
        self.seen.append((step, pixels))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_previews_are_small_and_change_no_image(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    requests = [replace(REQUEST, num_inference_steps=5, seed=seed, width=128, height=512) for seed in (1, 2, 3)]
    without_previews = generate_images(model, *requests)
    first, third = PreviewRecorder(), PreviewRecorder()
    decoded: list[int] = []
    hook = model.text_to_image.vae.decoder.register_forward_hook(lambda _, given, __: decoded.append(len(given[0])))
    with_previews = generate_images(
        model, replace(requests[0], preview_listener=first), requests[1], replace(requests[2], preview_listener=third)
    )
    hook.remove()
    assert [distance(a, b) for a, b in zip(with_previews, without_previews, strict=True)] == [0, 0, 0]
    assert [step for step, _ in first.seen] == [step for step, _ in third.seen] == [2, 4]
    assert {(picture.shape, picture.dtype.name) for _, picture in first.seen} == {((256, 64, 3), "uint8")}
    assert distance(first.seen[0][1], third.seen[0][1]) > DIFFERENT, "each listener gets its own preview"
    assert decoded == [2, 2, 3], "no preview is decoded for a request without a listener"


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [("sd15", "euler"), ("sd15", "dpm++_2m"), ("sd15", "unipc"), ("flux", None)]
)
def test_later_previews_are_nearer_to_the_final_image(loaded: Loaded, pipeline: str, scheduler: str | None) -> None:
    model, recorder = loaded(pipeline), PreviewRecorder()
    (image,) = generate_images(
        model, replace(REQUEST, num_inference_steps=11, scheduler=scheduler, preview_listener=recorder)
    )

    def distance_to_image(picture: np.ndarray) -> float:
        return float(np.abs(picture.astype(int) - image).mean())

    assert recorder.seen[-1][0] == 10
    assert distance_to_image(recorder.seen[-1][1]) < distance_to_image(recorder.seen[0][1])


def test_a_preview_that_does_not_fit_in_memory_does_not_fail_the_image(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recorder = loaded("sd15"), PreviewRecorder()
    before = generate_images(model, REQUEST)[0]
    decode = model.text_to_image.vae.decode
    calls: list[int] = []

    def fail_once(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return decode(*arguments, **options)

    monkeypatch.setattr(model.text_to_image.vae, "decode", fail_once)
    request = replace(REQUEST, preview_listener=recorder)
    assert distance(generate_images(model, request)[0], before) == 0
    assert recorder.seen == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_an_error(
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
        generate_images(model, REQUEST)
    hook.remove()
    assert decodes == [], "a decoder could turn them into a valid picture"


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_memory_savers_are_those_of_the_vae_and_end_with_the_call(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    vae = model.text_to_image.vae
    before = generate_images(model, REQUEST)[0]
    assert model.memory_savers(2) == ["vae_slicing"]
    assert model.memory_savers(1) == ["vae_tiling"]
    with model.saving_memory(["vae_slicing", "vae_tiling"]):
        assert vae.use_slicing
        assert vae.use_tiling
        generate_images(model, REQUEST, REQUEST)
    assert not vae.use_slicing
    assert not vae.use_tiling
    assert distance(generate_images(model, REQUEST)[0], before) == 0
