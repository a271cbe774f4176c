"""Mode `reference`: pipelines that read reference images themselves. Small ones of the real classes, random weights."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cachetools import LRUCache
from PIL import Image

from shared.contracts.generation import Mode
from shared.settings import GeneratorSettings, ModelSettings
from tests import small_pipelines
from tests.unit.test_diffusion_batches import REQUEST, ROUNDING, distance, generate_images, reference
from tests.unit.test_diffusion_nested_calls import assert_independent
from worker_service.models.generation import framing, schedulers
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.generation.native_references import CallShape, NativeReferences, in_prompt_order
from worker_service.models.interface import ImageRequest

pytestmark = pytest.mark.usefixtures("small_references")

Loaded = Callable[[str], Diffusion]
SIDE = 64
FULL_SIDE = 128
SIGNAL = 2 * ROUNDING
"""Images of different references differ by more. They differ less than those of different prompts."""

SAVERS: dict[str, Callable[[Path], None]] = {
    "klein": small_pipelines.save_flux2_klein,
    "klein_base": lambda folder: small_pipelines.save_flux2_klein(folder, distilled=False),
    "klein_kv": lambda folder: small_pipelines.save_flux2_klein(folder, kv=True),
    "klein_unweighed": small_pipelines.save_flux2_klein,
    "klein_two_sides": small_pipelines.save_flux2_klein,
    "dev": small_pipelines.save_flux2_dev,
    "kontext": small_pipelines.save_kontext,
    "qwen_edit": small_pipelines.save_qwen_image_edit,
    "qwen_edit_plus": lambda folder: small_pipelines.save_qwen_image_edit(folder, plus=True),
    "qwen_21": small_pipelines.save_qwen_image_21,
    "joy": small_pipelines.save_joyimage_edit_plus,
}
SHAPES = {
    "klein": CallShape.PACKED,
    "klein_kv": CallShape.PACKED,
    "dev": CallShape.PACKED,
    "qwen_edit_plus": CallShape.FLAT,
    "qwen_21": CallShape.FLAT,
    "joy": CallShape.NESTED,
    "kontext": CallShape.SINGLE,
    "qwen_edit": CallShape.SINGLE,
}
PACKED = ["klein", "klein_base", "klein_kv", "dev"]
WEIGHING = ["klein", "klein_base", "dev"]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """`native("klein")` gives that small pipeline as the worker loads it. Its first call saves and loads it."""

    def load(name: str) -> Diffusion:
        folder = tmp_path_factory.mktemp(name)
        SAVERS[name](folder)
        generator = GeneratorSettings(
            source=str(folder),
            reference_side=FULL_SIDE if name == "klein_two_sides" else SIDE,
            reference_side_of_several=SIDE if name == "klein_two_sides" else None,
            weigh_references=name not in ("klein_unweighed", "klein_two_sides"),
        )
        settings = ModelSettings(generators={name: generator}, default_generator=name, threads=1)
        return sharpened(Diffusion.load(name, settings))

    return cache(load)


def sharpened(model: Diffusion) -> Diffusion:
    """The model with sharper attention. Random weights attend to all tokens alike, so that references hardly differ."""
    with torch.no_grad():
        for name, parameter in model.text_to_image.transformer.named_parameters():
            if "norm_q" in name or "norm_k" in name or "norm_added" in name:
                parameter *= 2
    return model


ONE, TWO, THREE = (tuple(reference(seed) for seed in range(1, 1 + count)) for count in (1, 2, 3))
PLAIN = replace(REQUEST, num_inference_steps=2, ip_adapter_scale=1.0)
WITH = replace(PLAIN, mode=Mode.REFERENCE, references=TWO)


def drawn(model: Diffusion, request: ImageRequest) -> np.ndarray:
    return generate_images(model, request)[0]


@pytest.mark.parametrize("pipeline", PACKED)
def test_each_reference_and_their_order_change_the_image(native: Loaded, pipeline: str) -> None:
    model = native(pipeline)
    images = [
        drawn(model, replace(WITH, references=references))
        for references in ((), ONE, TWO, THREE, tuple(reversed(TWO)), (reference(1), reference(9)))
    ]
    assert distance(images[0], drawn(model, PLAIN)) == 0
    assert all(distance(a, b) > SIGNAL for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("pipeline", PACKED)
def test_rows_with_different_references_equal_their_own_alone(native: Loaded, pipeline: str, count: int) -> None:
    model = native(pipeline)
    requests = [
        replace(
            WITH,
            prompt=f"picture {row}" + " of many words" * row,
            seed=row,
            references=tuple(reference(10 * row + i) for i in range(count)),
        )
        for row in range(3)
    ]
    batched = generate_images(model, *requests)
    single = [drawn(model, request) for request in requests]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, single, strict=True)] == [True] * 3
    assert all(distance(a, b) > SIGNAL for i, a in enumerate(single) for b in single[:i])


@pytest.mark.parametrize("pipeline", SHAPES)
def test_a_pipeline_offers_what_the_shape_of_its_call_allows(native: Loaded, pipeline: str) -> None:
    model = native(pipeline)
    assert model.native_references is not None
    assert model.native_references.shape is SHAPES[pipeline]
    capabilities = model.capabilities
    assert "reference" in capabilities.modes
    assert capabilities.max_references == (1 if SHAPES[pipeline] is CallShape.SINGLE else 4)
    assert capabilities.reference_side == (None if pipeline in ("qwen_edit", "qwen_edit_plus", "joy") else SIDE)
    assert capabilities.weighs_references == (pipeline in ("klein", "dev"))
    assert capabilities.needs_reference == (pipeline in ("qwen_edit", "qwen_edit_plus"))


@pytest.mark.parametrize(
    ("pipeline", "count"),
    [("kontext", 0), ("kontext", 1), ("qwen_edit", 1)]
    + [("qwen_edit_plus", count) for count in (1, 2, 3)]
    + [("qwen_21", count) for count in (0, 1, 2, 3)],
)
def test_the_images_of_a_job_share_a_call_and_equal_their_own_alone(native: Loaded, pipeline: str, count: int) -> None:
    model = native(pipeline)
    references = THREE[:count]
    requests = [replace(WITH, references=references, seed=seed) for seed in (1, 2)]
    batched = generate_images(model, *requests)
    single = [drawn(model, request) for request in requests]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, single, strict=True)] == [True] * 2
    assert distance(*single) > SIGNAL
    others = [replace(requests[0], references=(reference(9), *references[1:]))]
    if count > 0:
        others.append(replace(requests[0], prompt="a pear"))
        others.append(replace(requests[0], references=tuple(reversed(references))) if count > 1 else PLAIN)
    for other in others:
        assert model.batch_key(other) != model.batch_key(requests[0])
        if not (model.capabilities.needs_reference and other is PLAIN):
            assert distance(drawn(model, replace(other, seed=1)), single[0]) > 0


def test_nested_lists_give_each_row_its_own_references(native: Loaded) -> None:
    model = native("joy")
    requests = [
        replace(WITH, prompt="picture" + " of words" * row, seed=row, references=references)
        for row, references in enumerate([TWO, (reference(7),), (), THREE])
    ]
    requests.append(replace(WITH, mode=Mode.CAPTION))
    batched = generate_images(model, *requests)
    single = [drawn(model, request) for request in requests]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, single, strict=True)] == [True] * 5
    assert (
        distance(drawn(model, replace(WITH, references=(reference(8),))), drawn(model, replace(WITH, references=ONE)))
        > 0
    )


def test_a_row_takes_no_reference_of_another_row(native: Loaded) -> None:
    model = native("klein")
    first, second = (replace(WITH, references=(reference(seed),)) for seed in (1, 2))
    images = generate_images(model, first, second)
    assert distance(images[0], drawn(model, first)) <= ROUNDING
    assert distance(images[1], drawn(model, second)) <= ROUNDING
    assert distance(images[0], images[1]) > SIGNAL


def drawn_by_diffusers(model: Diffusion, request: ImageRequest, *, side: int = SIDE) -> np.ndarray:
    """The image of `request` from the bare pipeline, called as its documentation says."""
    pipeline = model.text_to_image
    pipeline.scheduler = schedulers.new_scheduler(model.own_scheduler, None)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    size = (side, side)
    images = pipeline(
        prompt=request.prompt,
        image=[framing.initial_image(used.image, size, size) for used in request.references if used.image is not None],
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="np",
        **({"guidance_scale": request.guidance_scale} if "guidance_scale" in parameters else {}),
    ).images
    return np.asarray((images[0] * 255).round(), np.uint8)


@pytest.mark.parametrize("pipeline", PACKED)
def test_references_without_weights_are_those_of_the_plain_call_of_diffusers(native: Loaded, pipeline: str) -> None:
    model = native(pipeline)
    assert distance(drawn(model, WITH), drawn_by_diffusers(model, WITH)) == 0


def of_things(*things: str, weights: Sequence[float] = (), prompt: str = "a dog and a red car") -> ImageRequest:
    """A request with one reference for each name; equal names stand for one thing, and an empty name for none."""
    references = tuple(
        replace(reference(seed), concepts=(thing,) if thing else (), weight=weight)
        for seed, (thing, weight) in enumerate(zip(things, weights or [1.0] * len(things), strict=True), start=1)
    )
    return replace(WITH, prompt=prompt, references=references)


@pytest.mark.parametrize(
    ("things", "side"),
    [
        (["a dog"], FULL_SIDE),
        (["a dog", "a dog", "a dog"], FULL_SIDE),
        (["a dog", "a red car"], SIDE),
        (["two dogs"], SIDE),
        (["two dogs", "two dogs"], SIDE),
        ([""], FULL_SIDE),
        (["", ""], SIDE),
        (["a dog", ""], SIDE),
    ],
)
def test_references_of_several_things_have_a_side_of_their_own(native: Loaded, things: list[str], side: int) -> None:
    model = native("klein_two_sides")
    request = of_things(*things)
    call = model.reference_call(request)
    assert call is not None
    assert call["side"] == side
    assert distance(drawn(model, request), drawn_by_diffusers(model, request, side=side)) == 0
    one_side = native("klein_unweighed").reference_call(request)
    assert one_side == call | {"side": SIDE}


def test_a_reference_that_shows_all_things_has_the_side_of_one(native: Loaded) -> None:
    model = native("klein_two_sides")
    both = replace(reference(1), concepts=("a dog", "a red car"))
    sides = [
        call["side"]
        for references in ((both,), (both, replace(reference(2), concepts=("a dog",))))
        if (call := model.reference_call(replace(WITH, references=references))) is not None
    ]
    assert sides == [FULL_SIDE, FULL_SIDE]


def test_rows_share_a_call_only_with_references_of_one_side(native: Loaded) -> None:
    model = native("klein_two_sides")
    several = of_things("a dog", "a red car")
    others = of_things("a cat", "a hat", prompt="a cat wearing a hat")
    one = of_things("a dog", "a dog", prompt="a dog")
    assert model.batch_key(several) == model.batch_key(others) != model.batch_key(one)
    batched = generate_images(model, several, others)
    single = [drawn(model, request) for request in (several, others)]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, single, strict=True)] == [True] * 2
    qwen = native("qwen_21")
    assert qwen.native_references is not None
    two_sides = replace(qwen.native_references, side_of_several=FULL_SIDE)
    same_prompt = replace(one, prompt=several.prompt)
    assert two_sides.batch_key(several) != two_sides.batch_key(same_prompt)


def test_a_thing_is_not_looked_for_inside_of_another_word() -> None:
    car, carrot = (replace(reference(place), concepts=(thing,)) for place, thing in enumerate(("a car", "a carrot")))
    assert in_prompt_order([car, carrot], "A carrot and a car") == [carrot, car]


@pytest.mark.parametrize(
    ("things", "weights", "order"),
    [
        (["a red car", "a dog"], [0.5, 0.5], [1, 0]),
        (["a red car", "a dog", "a dog"], [0.5, 0.2, 0.3], [2, 0, 1]),
        (["a dog", "a dog", "a dog"], [0.2, 0.5, 0.3], [1, 2, 0]),
        (["", "", ""], [0.2, 0.5, 0.3], [1, 2, 0]),
        (["a bird", "a fish"], [0.4, 0.6], [1, 0]),
    ],
)
def test_references_come_in_the_order_in_which_the_prompt_names_their_things(
    native: Loaded, things: list[str], weights: list[float], order: list[int]
) -> None:
    model = native("klein")
    request = of_things(*things, weights=weights)
    call = model.reference_call(request)
    assert call is not None
    assert call["order"] == order
    assert call["weights"] == [pytest.approx(weights[place] / max(weights)) for place in order]
    ordered = [replace(request.references[place], weight=1, concepts=()) for place in order]
    if len(set(weights)) == 1:
        plain = replace(request, references=tuple(ordered))
        assert distance(drawn(model, request), drawn(model, plain)) == 0


def weighed(*weights: float, scale: float = 1.0) -> ImageRequest:
    references = tuple(reference(seed, weight=weight) for seed, weight in enumerate(weights, start=1))
    return replace(WITH, references=references, ip_adapter_scale=scale)


def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("pipeline", WEIGHING)
def test_a_weight_of_0_leaves_the_reference_out_and_more_of_it_changes_more(native: Loaded, pipeline: str) -> None:
    model = native(pipeline)
    without = drawn(model, weighed(1))
    assert distance(drawn(model, weighed(1, 1e-60)), without) <= ROUNDING
    changes = [mean_distance(drawn(model, weighed(1, weight)), without) for weight in (0.003, 0.03, 0.3, 1.0)]
    assert changes == sorted(changes)
    assert changes[-1] > 2 * changes[0]


@pytest.mark.parametrize("pipeline", WEIGHING)
def test_the_scale_multiplies_the_weights(native: Loaded, pipeline: str) -> None:
    model = native(pipeline)
    plain = drawn(model, PLAIN)
    assert distance(drawn(model, weighed(1, 1, scale=0)), plain) == 0
    assert distance(drawn(model, weighed(1, 1, scale=1e-60)), plain) <= ROUNDING
    assert distance(drawn(model, weighed(1, 1e-300, scale=1e-60)), plain) <= ROUNDING
    changes = [mean_distance(drawn(model, weighed(2, 2, scale=scale)), plain) for scale in (1e-4, 0.01, 0.1, 1.0)]
    assert changes == sorted(changes)
    assert changes[-1] > 2 * changes[0]


def test_rows_with_different_weights_share_a_call(native: Loaded) -> None:
    model = native("klein_base")
    requests = [replace(weighed(*weights), seed=seed) for seed, weights in enumerate([(1, 0.5), (1, 0.1), (2, 0.3)])]
    batched = generate_images(model, *requests)
    single = [drawn(model, request) for request in requests]
    assert [distance(a, b) <= ROUNDING for a, b in zip(batched, single, strict=True)] == [True] * 3


def test_weights_decide_only_the_order_unless_the_settings_let_them_weigh(native: Loaded) -> None:
    model = native("klein_unweighed")
    assert not model.capabilities.weighs_references
    images = [drawn(model, weighed(1, weight, scale=0.5)) for weight in (0.1, 0.5, 3)]
    assert distance(images[0], images[1]) == 0
    assert distance(images[1], images[2]) > SIGNAL


def test_a_pipeline_that_keeps_the_keys_of_references_does_not_weigh_them(native: Loaded) -> None:
    model = native("klein_kv")
    assert not model.capabilities.weighs_references
    assert distance(drawn(model, weighed(1, 0.1, scale=0.5)), drawn(model, WITH)) == 0


@pytest.mark.parametrize(
    ("pipeline", "inner"),
    [
        ("klein_base", PLAIN),
        ("klein_base", weighed(1, 0.2)),
        ("klein_base", replace(WITH, width=96)),
        ("klein_kv", replace(WITH, references=(reference(7),))),
        ("dev", replace(WITH, references=(reference(7),))),
        ("qwen_21", replace(WITH, references=(reference(7),))),
        ("qwen_edit_plus", replace(WITH, references=(reference(7),))),
        ("joy", replace(WITH, references=(reference(7),))),
    ],
)
def test_a_call_between_two_steps_changes_no_image(native: Loaded, pipeline: str, inner: ImageRequest) -> None:
    outer = [weighed(1, 0.5), replace(weighed(1, 0.5), seed=8)]
    assert_independent(native(pipeline), outer, [inner])


def test_a_reference_is_encoded_once_for_many_calls(native: Loaded) -> None:
    model = native("klein")
    assert model.native_references is not None
    kept = model.native_references.latents
    kept.clear()
    drawn(model, WITH)
    latents = dict(kept)
    assert [each.shape[-2:] for each in latents.values()] == [(SIDE // 4, SIDE // 4)] * 2
    drawn(model, replace(WITH, seed=8))
    generate_images(model, WITH, replace(WITH, references=(reference(2), reference(3))))
    assert len(kept) == 3
    assert all(kept[key] is each for key, each in latents.items())


def test_the_kept_latents_are_bounded_by_bytes(native: Loaded) -> None:
    model = native("klein")
    assert model.native_references is not None
    drawn(model, WITH)
    one = next(iter(model.native_references.latents.values())).nbytes
    small = NativeReferences(
        CallShape.PACKED, 4, SIDE, SIDE, "image {}", True, latents=LRUCache(one * 2, getsizeof=lambda each: each.nbytes)
    )
    model.native_references, before = small, model.native_references
    try:
        image = drawn(model, replace(WITH, references=THREE))
    finally:
        model.native_references = before
    assert small.latents.currsize == 2 * one
    assert distance(image, drawn(model, replace(WITH, references=THREE))) == 0


@pytest.mark.parametrize(
    ("pipeline", "prompt"),
    [
        ("klein", "image 2 beside image 1, {image 3}"),
        ("joy", "image 2 beside image 1, {image 3}"),
        ("qwen_21", "<image2> beside <image1>, {image 3}"),
        ("qwen_edit_plus", "Picture 2 beside Picture 1, {image 3}"),
        ("kontext", "{image 1} beside the image, {image 3}"),
    ],
)
def test_a_prompt_names_references_by_their_number_in_the_request(native: Loaded, pipeline: str, prompt: str) -> None:
    model = native(pipeline)
    named = replace(weighed(1, 2), prompt="{image 1} beside {image 2}, {image 3}")
    assert distance(drawn(model, named), drawn(model, replace(named, prompt=prompt))) == 0


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
@pytest.mark.parametrize("pipeline", [name for name, shape in SHAPES.items() if shape is not CallShape.PACKED])
def test_a_pipeline_gets_only_the_middle_of_a_very_long_picture(
    native: Loaded, pipeline: str, size: tuple[int, int]
) -> None:
    """Otherwise one side becomes 0 pixels. Or the pipeline scales the short side and then crops, in gigabytes."""
    model = native(pipeline)
    assert model.native_references is not None
    request = replace(WITH, references=(replace(reference(1), image=Image.linear_gradient("L").resize(size)),))
    given = model.native_references.arguments(model.text_to_image, [request], {"prompt": [request.prompt]})
    pictures = given["images"][0] if "images" in given else given["image"]
    picture = pictures[0] if isinstance(pictures, list) else pictures
    assert max(picture.size) <= framing.MAX_ASPECT * min(picture.size)
    if model.native_references.side is not None:  # the others make more pixels of it than a test has time for
        assert drawn(model, request).shape == (64, 64, 3)
