"""A model call between two steps of another call changes no bit of either. Small pipelines of the real classes."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from shared.contracts.generation import Mode
from tests.unit.test_diffusion_batches import DIFFERENT, REQUEST, PreviewRecorder, distance, generate_images, reference
from worker_service.execution.steps import CallStopped
from worker_service.models.generate_batch import GeneratedImage, generate_batch
from worker_service.models.generation.diffusion import Diffusion, PipelineState
from worker_service.models.interface import ImageRequest

Loaded = Callable[[str], Diffusion]


def two_requests(**common: object) -> list[ImageRequest]:
    return [replace(REQUEST, seed=seed, **common) for seed in (1, 2)]  # type: ignore[arg-type]


OUTER = two_requests(mode=Mode.IMAGE_PROMPT, references=(reference(1), reference(2, weight=2)))
INNER = {
    "bare": [replace(REQUEST, prompt="a dog")],
    "unguided": two_requests(guidance_scale=0.0),
    "another scheduler, more steps": two_requests(scheduler="dpm++_2m", num_inference_steps=4),
    "another scale, other references": two_requests(
        mode=Mode.IMAGE_PROMPT, references=(reference(3),), ip_adapter_scale=0.3, width=96
    ),
    "from an image": two_requests(mode=Mode.IMAGE_PROMPT_IMG2IMG, references=(reference(4),), strength=0.5),
}


def between_steps(
    model: Diffusion, outer: list[ImageRequest], inner: list[ImageRequest]
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """The images of `outer`, and those of `inner`, generated inside the outer call after each of its steps."""
    inside: list[list[np.ndarray]] = []

    def on_step(step: int, steps: int) -> bool:
        inside.append(generate_images(model, *inner))
        return True

    return model.generate(outer, on_step), inside


def are_equal(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return [distance(a, b) for a, b in zip(some, others, strict=True)] == [0] * len(some)


def assert_independent(model: Diffusion, outer: list[ImageRequest], inner: list[ImageRequest]) -> None:
    outside, inside = between_steps(model, outer, inner)
    assert are_equal(outside, generate_images(model, *outer))
    expected = generate_images(model, *inner)
    assert inside
    assert all(are_equal(images, expected) for images in inside)


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("pipeline", ["sd15", "sdxl", "sdxl_plus"])
def test_each_call_uses_its_own_references_and_scheduler(
    loaded: Loaded, pipeline: str, inner: list[ImageRequest]
) -> None:
    assert_independent(loaded(pipeline), OUTER, inner)
    assert_independent(loaded(pipeline), inner, OUTER)


@pytest.mark.parametrize("pipeline", ["sdxl_turbo", "flux"])
def test_calls_of_a_pipeline_without_adapter_can_be_nested(loaded: Loaded, pipeline: str) -> None:
    assert_independent(loaded(pipeline), two_requests(guidance_scale=2.0), [replace(REQUEST, width=96)])


@pytest.mark.parametrize("loras", [(), (("neon", 1.0),), (("ink", 0.2),)])
def test_each_call_uses_its_own_loras(loaded: Loaded, loras: tuple[tuple[str, float], ...]) -> None:
    model, outer = loaded("sd15_lora"), two_requests(loras=(("ink", 0.9),))
    assert_independent(model, outer, two_requests(loras=loras))
    assert distance(generate_images(model, *outer)[0], generate_images(model, *two_requests(loras=loras))[0]) > 0


def test_calls_can_be_nested_twice(loaded: Loaded) -> None:
    model = loaded("sd15")
    middle, innermost = INNER["unguided"], INNER["from an image"]
    inside: list[np.ndarray] = []

    def on_step(step: int, steps: int) -> bool:
        generated, further_inside = between_steps(model, middle, innermost)
        inside[:] = [*generated, *further_inside[-1]]
        return True

    assert are_equal(model.generate(OUTER, on_step), generate_images(model, *OUTER))
    assert are_equal(inside, [*generate_images(model, *middle), *generate_images(model, *innermost)])


def test_an_interrupted_inner_call_does_not_change_the_outer_call(loaded: Loaded) -> None:
    model = loaded("sd15")
    expected = generate_images(model, *OUTER)

    def on_step(step: int, steps: int) -> bool:
        with pytest.raises(CallStopped):
            model.generate(INNER["from an image"], lambda _step, _steps: False)
        return True

    assert are_equal(model.generate(OUTER, on_step), expected)
    assert model.state == PipelineState()


def test_both_calls_give_previews_of_their_own(loaded: Loaded) -> None:
    model, outer, inner = loaded("sd15"), PreviewRecorder(), PreviewRecorder()
    outer_request = replace(OUTER[0], preview_listener=outer)
    inner_request = replace(OUTER[1], preview_listener=inner)
    between_steps(model, [outer_request], [inner_request])
    single = PreviewRecorder()
    generate_images(model, replace(outer_request, preview_listener=single))
    assert distance(outer.seen[0][1], single.seen[0][1]) == 0
    assert distance(outer.seen[0][1], inner.seen[0][1]) > DIFFERENT


def test_memory_savers_apply_only_to_their_own_call(loaded: Loaded) -> None:
    """Tiles change pixels. An image that fits without them gets none, even inside a call that needs them."""
    model = loaded("sd15")
    vae = model.text_to_image.vae
    inside: list[GeneratedImage] = []
    tiled: list[bool] = []
    hook = vae.decoder.register_forward_pre_hook(lambda *_: tiled.append(vae.use_tiling))

    def on_step(step: int, steps: int) -> bool:
        if step == steps:
            inside.extend(generate_batch(model, [REQUEST], lambda _step, _steps: True))
        return True

    with model.saving_memory(["vae_tiling"]):
        model.generate([REQUEST], on_step)
    hook.remove()
    assert tiled == [False, True]
    assert inside[0].memory_savers == ()
    assert not vae.use_tiling
