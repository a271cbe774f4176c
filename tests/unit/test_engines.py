"""A generator whose images are drawn by engines: real HTTP servers that are slow, busy, wrong, away or dishonest."""

import io
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ops.local.layout import free_port
from scripts.try_model.trial import Options
from scripts.try_model.try_model import try_model
from shared.contracts.generation import Mode
from shared.errors import (
    BaseAppException,
    ContentRefusedError,
    EngineRefusedError,
    EngineUnavailableError,
    InvalidOutputError,
    ModelLoadError,
)
from shared.metrics import ENGINE_CALLS
from shared.settings import GeneratorSettings, ModelSettings, load_settings
from tests.fake_engine import Answer, Drawing, FakeEngine, blocks, error_answer, picture_answer
from tests.image_request import IMAGE_REQUEST
from tests.stack import wait_until
from worker_service.execution.steps import CallStopped, go_on
from worker_service.models.engines.generator import OpenAIGenerator
from worker_service.models.interface import ImageRequest, Reference

KEY = "sk-very-secret-key"
REQUEST = replace(IMAGE_REQUEST, height=32, guidance_scale=3.5)

Load = Callable[..., OpenAIGenerator]


def settings_for(urls: Sequence[str], *, engine: dict[str, Any] | None = None, **generator: Any) -> ModelSettings:
    named = {"urls": list(urls), "model": "painter", "timeout_s": 20, "connect_timeout_s": 1, "size_multiple": 8}
    defaults = {"num_inference_steps": 4, "guidance_scale": 3.5}
    settings = {"kind": "openai", "engine": named | (engine or {}), "native_side": 64, "defaults": defaults} | generator
    return ModelSettings.model_validate({"generators": {"remote": settings}, "default_generator": "remote"})


@pytest.fixture
def load() -> Iterator[Load]:
    """`load(engine, ...)`: the generator of these engines, as a worker loads it, before its warm-up."""
    with ExitStack() as opened:

        def load(*engines: FakeEngine | str, **settings: Any) -> OpenAIGenerator:
            urls = [each if isinstance(each, str) else each.url for each in engines]
            model = OpenAIGenerator.load("remote", settings_for(urls, **settings))
            opened.callback(model.close)
            return model

        yield load


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine().serving() as engine:
        yield engine


@pytest.fixture
def other_engine() -> Iterator[FakeEngine]:
    with FakeEngine().serving() as engine:
        yield engine


def calls(engine: FakeEngine, outcome: str) -> float:
    """Calls of this engine that the metric has counted."""
    return float(ENGINE_CALLS.labels("remote", engine.url, outcome)._value.get())


def draw(model: OpenAIGenerator, *requests: ImageRequest) -> list[np.ndarray]:
    return model.generate(requests or [REQUEST], go_on)


# --- the call -----------------------------------------------------------------------------------------------------


def test_an_image_is_drawn_with_all_parameters_of_its_request(load: Load, engine: FakeEngine) -> None:
    model = load(engine, engine={"api_key": KEY})
    (image,) = draw(model, replace(REQUEST, negative_prompt="blurry"))
    (drawing,) = engine.drawings
    assert drawing.path == "images/generations"
    assert drawing.fields == {
        "model": "painter",
        "prompt": "a red apple",
        "n": 1,
        "size": "64x32",
        "seed": 7,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "negative_prompt": "blurry",
        "response_format": "b64_json",
    }
    assert drawing.headers["Authorization"] == f"Bearer {KEY}"
    assert image.shape == (32, 64, 3)
    assert (image == blocks(drawing)).all()


def test_fields_have_the_names_and_values_that_the_settings_give(load: Load, engine: FakeEngine) -> None:
    fields = {"guidance_scale": "true_cfg_scale", "negative_prompt": "", "response_format": ""}
    model = load(engine, engine={"fields": fields, "extra": {"quality": "high", "cache": False}})
    draw(model)
    sent = engine.drawings[0].fields
    assert sent["true_cfg_scale"] == 3.5
    assert sent["quality"] == "high"
    assert sent["cache"] is False
    assert sent.keys().isdisjoint({"guidance_scale", "negative_prompt", "response_format"})
    assert not model.capabilities.supports_negative_prompt
    assert model.capabilities.supports_guidance


def reference(colour: str, *, weight: float, caption: str | None = None) -> Reference:
    return Reference(None, Image.new("RGB", (40, 20), colour), weight, caption, sha256=colour)


def test_pictures_of_references_are_sent_in_their_order(load: Load, engine: FakeEngine) -> None:
    model = load(engine, engine={"modes": ["none", "reference"], "image_field": "image[]"}, reference_side=16)
    references = (reference("blue", weight=1), reference("red", weight=3), reference("green", weight=0))
    request = replace(REQUEST, prompt="the cup of {image 1}", mode=Mode.REFERENCE, references=references)
    (image,) = draw(model, request)
    (drawing,) = engine.drawings
    assert drawing.path == "images/edits"
    assert drawing.fields["prompt"] == "the cup of image 2"  # the heavier one comes first
    assert drawing.fields["num_inference_steps"] == "4"
    sizes_and_colours = [(picture.size, picture.getpixel((0, 0))) for picture in map(opened, drawing.pictures)]
    assert sizes_and_colours == [((16, 8), (255, 0, 0)), ((16, 8), (0, 0, 255))]
    assert model.reference_call(request) == {"shape": "images/edits", "order": [1, 0], "side": 16, "fit": "engine"}
    assert model.reference_call(REQUEST) is None
    assert (image == blocks(drawing)).all()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_captions_follow_the_prompt(load: Load, engine: FakeEngine) -> None:
    references = (reference("blue", weight=1, caption="a blue cup"), reference("red", weight=2, caption="a red cup"))
    draw(load(engine), replace(REQUEST, mode=Mode.CAPTION, references=references))
    assert engine.drawings[0].fields["prompt"] == "a red apple, a red cup, a blue cup"
    assert engine.drawings[0].pictures == []


def test_transparent_parts_are_white(load: Load, engine: FakeEngine) -> None:
    engine.paint = lambda drawing: np.dstack([blocks(drawing), np.zeros((32, 64), np.uint8)])
    (image,) = draw(load(engine))
    assert (image == 255).all()


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error", "context"),
    [
        (lambda _: error_answer(400, "bad_size"), EngineRefusedError, {"reason": "bad_size"}),
        (lambda _: error_answer(400, "line\nbreak"), EngineRefusedError, {}),
        (lambda _: ("{not json", 400), EngineRefusedError, {}),
        (lambda _: ({"detail": "the size is wrong"}, 422), EngineRefusedError, {}),
        (lambda _: (["a list"], 413), EngineRefusedError, {}),
        (
            lambda _: error_answer(403, "moderation_blocked"),
            ContentRefusedError,
            {"reason": "moderation_blocked"},
        ),
        (
            lambda _: error_answer(400, "content_policy_violation"),
            ContentRefusedError,
            {"reason": "content_policy_violation"},
        ),
    ],
)
def test_a_refusal_is_final(
    load: Load,
    engine: FakeEngine,
    other_engine: FakeEngine,
    answer: Callable[[Drawing], Answer],
    error: type[BaseAppException],
    context: dict[str, Any],
) -> None:
    engine.answer = other_engine.answer = answer
    with pytest.raises(error) as raised:
        draw(load(engine, other_engine))
    assert type(raised.value) is error
    assert raised.value.context == context
    assert len(engine.drawings) + len(other_engine.drawings) == 1


@pytest.mark.parametrize(
    ("answer", "retry_after_s"),
    [
        (lambda _: error_answer(429, Retry_After="17"), 17),
        (lambda _: error_answer(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), 0),
        (lambda _: error_answer(429, "rate_limit", Retry_After="soon"), 1),
        (lambda _: error_answer(504), 1),
        (lambda _: ("Traceback (most recent call last)", 500), 5),
        (lambda _: error_answer(401, "invalid_api_key"), 5),
        (lambda _: error_answer(404), 5),
        (lambda _: ("", 307, {"Location": "http://127.0.0.1:1/v1/images/generations"}), 5),
    ],
)
def test_a_busy_or_broken_engine_is_a_temporary_error(
    load: Load, engine: FakeEngine, answer: Callable[[Drawing], Answer], retry_after_s: int | None
) -> None:
    engine.answer = answer
    with pytest.raises(EngineUnavailableError) as raised:
        draw(load(engine))
    assert raised.value.retry_after_s == retry_after_s
    assert "Traceback" not in str(raised.value.body())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: "<html>", "not a JSON object with images"),
        (lambda _: {"data": []}, "not a JSON object with images"),
        (lambda _: {"data": [{"url": "http://169.254.169.254/secret"}]}, "no image in `b64_json`"),
        (lambda _: {"data": [{"b64_json": "not base64!"}]}, "not a PNG, JPEG or WebP"),
        (lambda _: {"data": [{"b64_json": "aGVsbG8="}]}, "not a PNG, JPEG or WebP"),
        (lambda _: picture_answer(np.ones((32, 32, 3), np.uint8)), "32 x 32 pixels instead of 64 x 32"),
    ],
)
def test_an_answer_without_the_image_is_named(
    load: Load, engine: FakeEngine, answer: Callable[[Drawing], Answer], message: str
) -> None:
    engine.answer = answer
    with pytest.raises(InvalidOutputError, match=message):
        draw(load(engine))


def test_an_answer_that_is_too_large_is_not_read_to_its_end(
    load: Load, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_service.models.engines.pool.MAX_ANSWER_BYTES", 1000)
    engine.answer = lambda _: "x" * 100_000
    with pytest.raises(InvalidOutputError, match="more than 1000 bytes"):
        draw(load(engine))


def test_an_engine_that_takes_too_long_is_a_temporary_error(load: Load, engine: FakeEngine) -> None:
    engine.answer = engine.until_released
    model = load(engine, engine={"timeout_s": 0.3})
    with pytest.raises(EngineUnavailableError, match="did not answer in time"):
        draw(model)
    assert engine.closed.wait(5)


def test_neither_the_log_nor_an_error_has_the_key_or_the_prompt(
    load: Load, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.answer = lambda drawing: ({"error": {"code": f"not {drawing.fields['prompt']}"}, "key": KEY}, 400)
    model = load(engine, engine={"api_key": KEY})
    with caplog.at_level(logging.DEBUG), pytest.raises(EngineRefusedError) as raised:
        draw(model)
    said = str(raised.value.body()) + "".join(str(vars(record)) for record in caplog.records)
    assert KEY not in said
    assert REQUEST.prompt not in said


# --- several engines ----------------------------------------------------------------------------------------------


def test_images_are_balanced_and_no_engine_gets_more_than_its_share(
    load: Load, engine: FakeEngine, other_engine: FakeEngine
) -> None:
    engine.seconds = other_engine.seconds = 0.05
    model = load(engine, other_engine, engine={"concurrency": 2})
    assert model.capabilities.images_at_once == 4
    requests = [replace(REQUEST, seed=seed) for seed in range(20)]
    images = draw(model, *requests)
    assert len(engine.drawings) == len(other_engine.drawings) == 10
    assert engine.most_in_flight == other_engine.most_in_flight == 2
    assert len({image.tobytes() for image in images}) == 20


def test_a_slow_engine_gets_fewer_images(load: Load, engine: FakeEngine, other_engine: FakeEngine) -> None:
    engine.seconds, other_engine.seconds = 0.3, 0.01
    draw(load(engine, other_engine), *[replace(REQUEST, seed=seed) for seed in range(20)])
    assert len(engine.drawings) < len(other_engine.drawings)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_image_that_one_engine_cannot_draw_is_drawn_by_another(
    load: Load, engine: FakeEngine, other_engine: FakeEngine, status: int
) -> None:
    engine.answer = lambda _: error_answer(status)
    model = load(engine, other_engine)
    images = draw(model, *[replace(REQUEST, seed=seed) for seed in range(6)])
    assert len(images) == 6
    assert len(other_engine.drawings) == 6
    assert calls(engine, "failed" if status == 500 else "busy") == len(engine.drawings)
    assert calls(other_engine, "drawn") == 6


def test_a_busy_engine_gets_no_image_while_it_rests(load: Load, engine: FakeEngine, other_engine: FakeEngine) -> None:
    engine.answer = lambda _: error_answer(503, Retry_After="60")
    model = load(engine, other_engine, engine={"concurrency": 1})
    for seed in range(5):
        draw(model, replace(REQUEST, seed=seed))
    assert len(engine.drawings) == 1
    assert model.is_available()


def test_without_an_engine_that_takes_images_the_model_is_not_available(load: Load, engine: FakeEngine) -> None:
    engine.answer = lambda _: error_answer(503, Retry_After="60")
    model = load(engine)
    assert model.is_available()
    with pytest.raises(EngineUnavailableError):
        draw(model)
    assert not model.is_available()
    with pytest.raises(EngineUnavailableError) as raised:
        draw(model)
    assert 1 <= (raised.value.retry_after_s or 0) <= 60
    assert len(engine.drawings) == 1


def test_an_engine_that_is_killed_while_it_draws_loses_no_image(load: Load, other_engine: FakeEngine) -> None:
    port = free_port(excluding=set())
    killed = subprocess.Popen([sys.executable, "-m", "tests.fake_engine", str(port), "60"])
    try:
        other_engine.seconds = 0.1
        url = f"http://127.0.0.1:{port}/v1"
        model = load(url, other_engine, engine={"concurrency": 1})
        wait_until(
            lambda: model.is_available() and not any(each.is_away for each in model.pool.engines),
            timeout_s=30,
            what="both engines",
        )
        with ThreadPoolExecutor(1) as thread:
            images = thread.submit(draw, model, *[replace(REQUEST, seed=seed) for seed in range(4)])
            wait_until(lambda: model.pool.engines[0].in_flight == 1, timeout_s=10, what="an image in flight")
            killed.kill()
            assert len({image.tobytes() for image in images.result(20)}) == 4
        assert len(other_engine.drawings) == 4
        assert model.is_available()
        assert model.pool.engines[0].is_away
    finally:
        killed.kill()
        killed.wait()


def test_an_engine_that_comes_back_is_used_again(load: Load, engine: FakeEngine) -> None:
    port = free_port(excluding=set())
    first = FakeEngine()
    with first.serving(port):
        model = load(first, engine={"connect_timeout_s": 0.2})
        draw(model)
    with pytest.raises(EngineUnavailableError, match="cannot be reached"):
        draw(model)
    assert not model.is_available()
    with FakeEngine().serving(port):
        assert model.is_available()
        draw(model)


def test_a_worker_waits_for_the_first_engine(load: Load) -> None:
    port = free_port(excluding=set())
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load, f"http://127.0.0.1:{port}/v1")
        with pytest.raises(TimeoutError):
            loading.result(0.5)
        with FakeEngine().serving(port):
            assert loading.result(20).is_available()


def test_a_generator_without_engines_is_not_loaded(load: Load) -> None:
    url = f"http://127.0.0.1:{free_port(excluding=set())}/v1"
    with pytest.raises(ModelLoadError, match=f"No engine of 'remote' answers: {url}"):
        load(url, engine={"timeout_s": 0.1})


# --- cancel -------------------------------------------------------------------------------------------------------


def test_a_canceled_image_closes_its_connection(load: Load, engine: FakeEngine) -> None:
    engine.answer = engine.until_released
    model = load(engine)
    started = time.monotonic()
    with pytest.raises(CallStopped):
        model.generate([REQUEST], lambda *_: not engine.drawings)
    assert time.monotonic() - started < 5
    assert engine.closed.wait(5)
    wait_until(lambda: model.pool.engines[0].in_flight == 0, timeout_s=5, what="the engine to be free")
    engine.answer = engine.draw
    draw(model)


def test_a_closed_model_stops_its_images(load: Load, engine: FakeEngine) -> None:
    engine.answer = engine.until_released
    model = load(engine)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(draw, model)
        wait_until(lambda: engine.drawings, timeout_s=5, what="the image in flight")
        model.close()
        with pytest.raises(CallStopped):
            running.result(5)
    assert engine.closed.wait(5)
    assert not model.is_available()


def test_a_canceled_image_that_waits_for_an_engine_is_never_sent(load: Load, engine: FakeEngine) -> None:
    engine.answer = engine.until_released
    model = load(engine, engine={"concurrency": 1})
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(draw, model)
        wait_until(lambda: engine.drawings, timeout_s=5, what="the first image in flight")
        with pytest.raises(CallStopped):
            model.generate([replace(REQUEST, seed=8)], lambda *_: False)
        engine.released.set()
        running.result(5)
    assert len(engine.drawings) == 1


# --- what is measured at start ------------------------------------------------------------------------------------


def test_an_honest_engine_keeps_what_the_settings_say(load: Load, engine: FakeEngine) -> None:
    model = load(engine, engine={"modes": ["none", "caption", "reference"]})
    before = model.capabilities
    model.warm_up()
    assert model.capabilities == before
    assert before.modes == ["none", "caption", "reference"]
    assert not before.reports_steps
    assert (before.weights_digest_kind, before.pipeline) == ("stated", "openai:painter")
    assert {drawing.path for drawing in engine.drawings} == {"images/generations", "images/edits"}
    assert {int(drawing.fields["num_inference_steps"]) for drawing in engine.drawings} == {2}


def test_the_digest_is_the_stated_one_or_that_of_model_and_revision(load: Load, engine: FakeEngine) -> None:
    stated = load(engine, engine={"digest": "sha256:0123"}).capabilities.weights_digest
    one, other = (load(engine, revision=revision).capabilities.weights_digest for revision in ("a", "b"))
    assert stated == "sha256:0123"
    assert len({stated, one, other}) == 3


def random_image(drawing: Drawing) -> np.ndarray:
    return np.random.default_rng().integers(1, 255, (*drawing.size[::-1], 3), dtype=np.uint8)


def test_an_engine_that_ignores_the_seed_is_found(
    load: Load, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.paint = random_image
    model = load(engine)
    with caplog.at_level(logging.WARNING):
        model.warm_up()
    assert model.capabilities.repeating_changes_images
    assert "repeating_changes_images" in caplog.messages


def test_an_engine_that_draws_another_image_than_the_others_is_found(
    load: Load, engine: FakeEngine, other_engine: FakeEngine
) -> None:
    other_engine.paint = lambda drawing: 255 - blocks(drawing)
    model = load(engine, other_engine)
    model.warm_up()
    assert model.capabilities.repeating_changes_images


def test_a_difference_by_rounding_is_none(load: Load, engine: FakeEngine) -> None:
    engine.paint = lambda drawing: blocks(drawing) + np.uint8(len(engine.drawings) % 2)
    model = load(engine)
    model.warm_up()
    assert not model.capabilities.repeating_changes_images


def test_an_engine_that_takes_no_seed_repeats_nothing(load: Load, engine: FakeEngine) -> None:
    model = load(engine, engine={"fields": {"seed": ""}})
    model.warm_up()
    assert model.capabilities.repeating_changes_images
    assert all("seed" not in drawing.fields for drawing in engine.drawings)


def test_an_engine_whose_images_depend_on_their_company_draws_them_one_by_one(
    load: Load, engine: FakeEngine, other_engine: FakeEngine
) -> None:
    together = threading.Barrier(2)

    def answer(drawing: Drawing) -> Answer:
        try:
            together.wait(0.3)
        except threading.BrokenBarrierError:
            together.reset()
            return picture_answer(blocks(drawing))
        return picture_answer(255 - blocks(drawing))

    engine.answer = answer
    model = load(engine, other_engine, engine={"concurrency": 2})
    model.warm_up()
    assert model.capabilities.batching_changes_images
    assert not model.capabilities.repeating_changes_images
    assert model.capabilities.images_at_once == 2
    engine.answer, engine.most_in_flight = engine.draw, 0
    engine.seconds = other_engine.seconds = 0.05
    draw(model, *[replace(REQUEST, seed=seed) for seed in range(8)])
    assert engine.most_in_flight == other_engine.most_in_flight == 1


def test_an_engine_that_draws_one_size_only_is_found(load: Load, engine: FakeEngine) -> None:
    engine.paint = lambda _: np.ones((64, 64, 3), np.uint8)
    model = load(engine)
    assert model.capabilities.any_size
    model.warm_up()
    assert not model.capabilities.any_size


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (lambda _: picture_answer(np.ones((8, 8, 3), np.uint8)), "8 x 8 pixels instead of 64 x 64"),
        (lambda _: error_answer(401), "status 401"),
        (lambda _: error_answer(400), "refused the request"),
    ],
)
def test_an_engine_that_cannot_draw_is_refused_at_start(
    load: Load, engine: FakeEngine, answer: Callable[[Drawing], Answer], cause: str
) -> None:
    engine.answer = answer
    with pytest.raises(ModelLoadError, match=cause):
        load(engine).warm_up()


def test_a_model_that_only_edits_pictures_gets_one_in_every_call(load: Load, engine: FakeEngine) -> None:
    model = load(engine, engine={"modes": ["reference"]})
    model.warm_up()
    assert model.capabilities.needs_reference
    assert {drawing.path for drawing in engine.drawings} == {"images/edits"}


def test_try_model_measures_an_engine(engine: FakeEngine, tmp_path: Path) -> None:
    engine.seconds = 0.01
    options = Options("remote", "a red apple", tmp_path, size=None, steps=None, repeats=1)
    model = settings_for([engine.url], engine={"modes": ["none"]})
    report = try_model(options, load_settings(model=model), tmp_path, on_progress=lambda _: None)
    assert report.passed
    assert report.probe == [
        "A repeated request gives the same image.",
        "An image does not change when others are drawn beside it.",
    ]
    assert GeneratorSettings.model_validate(report.settings).engine == model.generators["remote"].engine
