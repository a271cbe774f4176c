"""A call between two steps of another one changes no bit of either: on small pipelines of the real classes."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from shared.contracts.generation import Mode
from tests.unit.test_diffusion_batches import DIFFERENT, REQUEST, Looking, distance, draw, reference
from worker_service.models.diffusion import Conditions, Diffusion
from worker_service.models.generate_batch import Drawn
from worker_service.models.generate_batch import draw as draw_in_little_memory
from worker_service.models.interface import ImageRequest, Interrupted

Loaded = Callable[[str], Diffusion]


def several(**common: object) -> list[ImageRequest]:
    return [replace(REQUEST, seed=seed, **common) for seed in (1, 2)]  # type: ignore[arg-type]


OUTER = several(mode=Mode.IMAGE_PROMPT, references=(reference(1), reference(2, weight=2)), num_inference_steps=4)
INNER = {
    "bare": [replace(REQUEST, prompt="a dog")],
    "unguided": several(guidance_scale=0.0),
    "another scheduler, more steps": several(scheduler="dpm++_2m", num_inference_steps=6),
    "another scale, other references": several(
        mode=Mode.IMAGE_PROMPT, references=(reference(3),), ip_adapter_scale=0.3, width=96
    ),
    "from an image": several(mode=Mode.IMAGE_PROMPT_IMG2IMG, references=(reference(4),), strength=0.5),
}


def between_steps(
    model: Diffusion, outer: list[ImageRequest], inner: list[ImageRequest]
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """The images of `outer`, and those of `inner` drawn inside of that call after each of its steps."""
    inside: list[list[np.ndarray]] = []

    def on_step(step: int, steps: int) -> bool:
        inside.append(draw(model, *inner))
        return True

    return model.generate(outer, on_step), inside


def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return [distance(a, b) for a, b in zip(some, others, strict=True)] == [0] * len(some)


def assert_unharmed(model: Diffusion, outer: list[ImageRequest], inner: list[ImageRequest]) -> None:
    outside, inside = between_steps(model, outer, inner)
    assert same(outside, draw(model, *outer))
    expected = draw(model, *inner)
    assert inside
    assert all(same(images, expected) for images in inside)


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("pipeline", ["sd15", "sdxl", "sdxl_plus"])
def test_references_and_schedulers_are_those_of_the_call(
    loaded: Loaded, pipeline: str, inner: list[ImageRequest]
) -> None:
    assert_unharmed(loaded(pipeline), OUTER, inner)
    assert_unharmed(loaded(pipeline), inner, OUTER)


@pytest.mark.parametrize("pipeline", ["sdxl_turbo", "flux"])
def test_a_pipeline_without_adapter_can_be_entered_again(loaded: Loaded, pipeline: str) -> None:
    assert_unharmed(loaded(pipeline), several(guidance_scale=2.0), [replace(REQUEST, width=96)])


@pytest.mark.parametrize("loras", [(), (("neon", 1.0),), (("ink", 0.2),)])
def test_loras_are_those_of_the_call(loaded: Loaded, loras: tuple[tuple[str, float], ...]) -> None:
    model, outer = loaded("sd15_lora"), several(loras=(("ink", 0.9),))
    assert_unharmed(model, outer, several(loras=loras))
    assert distance(draw(model, *outer)[0], draw(model, *several(loras=loras))[0]) > 0


def test_a_call_inside_of_one_that_is_inside(loaded: Loaded) -> None:
    model = loaded("sd15")
    middle, innermost = INNER["unguided"], INNER["from an image"]
    inside: list[np.ndarray] = []

    def on_step(step: int, steps: int) -> bool:
        drawn, further_inside = between_steps(model, middle, innermost)
        inside[:] = [*drawn, *further_inside[-1]]
        return True

    assert same(model.generate(OUTER, on_step), draw(model, *OUTER))
    assert same(inside, [*draw(model, *middle), *draw(model, *innermost)])


def test_one_that_fails_or_is_stopped_harms_not_the_other(loaded: Loaded) -> None:
    model = loaded("sd15")
    expected = draw(model, *OUTER)

    def on_step(step: int, steps: int) -> bool:
        with pytest.raises(Interrupted):
            model.generate(INNER["from an image"], lambda _step, _steps: False)
        return True

    assert same(model.generate(OUTER, on_step), expected)
    assert model.conditions == Conditions()


def test_both_are_looked_at(loaded: Loaded) -> None:
    model, outer, inner = loaded("sd15"), Looking(), Looking()
    mine = replace(OUTER[0], onlooker=outer)
    other = replace(OUTER[1], onlooker=inner)
    between_steps(model, [mine], [other])
    alone = Looking()
    draw(model, replace(mine, onlooker=alone))
    assert distance(outer.seen[0][1], alone.seen[0][1]) == 0
    assert distance(outer.seen[0][1], inner.seen[0][1]) > DIFFERENT


def test_what_saves_memory_is_that_of_the_call(loaded: Loaded) -> None:
    """Tiles change pixels: an image that fits without them is drawn without, also inside of a call that needs them."""
    model = loaded("sd15")
    vae = model.text_to_image.vae
    inside: list[Drawn] = []
    tiled: list[bool] = []
    hook = vae.decoder.register_forward_pre_hook(lambda *_: tiled.append(vae.use_tiling))

    def on_step(step: int, steps: int) -> bool:
        if step == steps:
            inside.extend(draw_in_little_memory(model, [REQUEST], lambda _step, _steps: True))
        return True

    with model.saving_memory(["vae_tiling"]):
        model.generate([REQUEST], on_step)
    hook.remove()
    assert tiled == [False, True]
    assert inside[0].memory_savers == ()
    assert not vae.use_tiling
