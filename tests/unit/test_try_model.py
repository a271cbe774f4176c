"""`python -m scripts.try_model`: the report about small pipelines of the real classes, and about models that fail."""

import io
import json
import sys
import time
import tomllib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
from PIL import Image
from rich.console import Console

from scripts.try_model import __main__ as command
from scripts.try_model.measurements import largest_batch_that_pays, measurements
from scripts.try_model.promises import Promises, probe_verdict
from scripts.try_model.report import Measurement, Outcome, TryReport
from scripts.try_model.settings_text import as_toml, found_settings
from scripts.try_model.tables import print_report
from scripts.try_model.trial import Trial
from shared.contracts.generation import Mode
from shared.errors import ModelOutOfMemoryError
from shared.settings import GeneratorSettings, ModelSettings
from tests.small_pipelines import save_flux2_klein
from worker_service.execution.steps import OnStep
from worker_service.models.fake import FakeGenerator
from worker_service.models.interface import ImageRequest, Reference
from worker_service.models.worker_models import GENERATORS

PIPELINES = {
    "sd15_lora": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "klein": "Flux2KleinPipeline",
}


@dataclass(frozen=True)
class Ended:
    """How the command ended."""

    code: int | str | None
    out: str
    err: str

    @property
    def report(self) -> TryReport:
        return TryReport.model_validate_json(self.out)

    def outcomes(self, name: str) -> dict[str | None, Outcome]:
        return {check.mode: check.outcome for check in self.report.checks if check.name == name}


def run(*arguments: str, generators: dict[str, Any], clip: Path | None = None) -> Ended:
    """Run the command with these generators in its settings."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["try_model", *arguments])
        patch.setenv("COLUMNS", "250")
        patch.setenv("AFTERIMAGE_MODEL__GENERATORS", json.dumps(generators))
        patch.setenv("AFTERIMAGE_MODEL__DEFAULT_GENERATOR", next(iter(generators)))
        patch.setenv("AFTERIMAGE_MODEL__THREADS", "1")
        patch.setenv("AFTERIMAGE_ENVIRONMENT", "test")
        if clip is not None:
            patch.setenv("AFTERIMAGE_MODEL__CLIP__MODEL", f"local-dir:{clip}")
        with pytest.raises(SystemExit) as ended:
            command.main()
    return Ended(ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four pictures that differ strongly, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, caption in enumerate(("red apple", "yellow boat", "green tree", "blue cup")):
        colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(colours).resize((96, 80), Image.Resampling.NEAREST)
        picture.save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def tried(
    model_settings: ModelSettings, small_models: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Ended]:
    """`tried("sdxl")`: how the command ended for that small pipeline, with `--json`."""
    save_flux2_klein(small_models / "klein")
    klein = GeneratorSettings(source=str(small_models / "klein"), reference_side=32, weigh_references=True)
    generators = {"klein": klein, **model_settings.generators}

    def run_once(name: str) -> Ended:
        out = tmp_path_factory.mktemp("tried")
        arguments = [name, "--size", "64", "--steps", "2", "--repeats", "1", "--json"]
        arguments += ["--references", str(pictures), "--out", str(out)]
        settings = generators[name].model_dump(mode="json", exclude_unset=True) | {"max_batch_size": 2}
        return run(*arguments, generators={name: settings}, clip=small_models / "clip")

    return cache(run_once)


# --- real pipelines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_that_keeps_all_promises_ends_with_0(tried: Callable[[str], Ended], name: str) -> None:
    ended = tried(name)
    assert [check for check in ended.report.checks if check.outcome is Outcome.FAIL] == []
    assert ended.code == 0
    assert ended.report.passed
    assert ended.report.capabilities.pipeline == PIPELINES[name]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_promise_is_checked_in_every_mode_that_it_concerns(tried: Callable[[str], Ended], name: str) -> None:
    ended = tried(name)
    modes = set(ended.report.capabilities.modes)
    for each in ("draws", "random_numbers_are_seeded", "alone_equals_batched", "interrupted_equals_alone"):
        assert ended.outcomes(each) == dict.fromkeys(modes, Outcome.PASS), each
    assert ended.outcomes("references_change_image") == dict.fromkeys(modes - {"none"}, Outcome.PASS)
    weighing = "reference" if name == "klein" else "image_prompt"
    for each in ("weight_0_leaves_out", "tiny_weight_fades", "scale_0_leaves_out", "weights_are_monotone"):
        assert ended.outcomes(each) == {weighing: Outcome.PASS}, each
    for each in ("repeatable", "prompt_changes_image", "seed_changes_image", "other_sizes_draw"):
        assert ended.outcomes(each) == {"none": Outcome.PASS}, each
    for each in ("previews_change_nothing", "cancel_stops_within_a_step"):
        assert ended.outcomes(each) == {"none": Outcome.PASS}, each
    assert ended.outcomes("loras_change_image") == {"none": Outcome.PASS if name == "sd15_lora" else Outcome.SKIPPED}
    assert ended.outcomes("schedulers_draw") == {"none": Outcome.SKIPPED if name == "klein" else Outcome.PASS}


def test_calls_are_measured_by_images_and_by_references(tried: Callable[[str], Ended]) -> None:
    report = tried("klein").report
    rows = [(row.images, row.references, row.mode) for row in report.measurements]
    plain = [(images, 0, "none") for images in (1, 2)]
    assert rows == [*plain, *[(1, count, "reference") for count in (1, 2, 3, 4)], (2, 4, "reference")]
    assert all((row.seconds_per_image or 0) > 0 for row in report.measurements)
    assert report.largest_batch_that_pays in (1, 2)
    assert report.reference_call is not None
    assert report.reference_call["shape"] == "packed"
    assert report.previews.available


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux measures the peak of a process")
def test_memory_is_measured_at_rest_and_at_its_peak(tried: Callable[[str], Ended]) -> None:
    report = tried("sdxl").report
    assert report.rest_bytes is not None
    assert report.rest_bytes > 50 * 2**20
    assert all((row.peak_bytes or 0) > 50 * 2**20 for row in report.measurements)


def test_the_sheet_has_one_row_per_mode(tried: Callable[[str], Ended]) -> None:
    report = tried("sd15_lora").report
    assert report.sheet is not None
    with Image.open(report.sheet) as sheet:
        cell = 128 + 8
        assert sheet.height == 28 + len(report.capabilities.modes) * (cell + 20)
        assert sheet.width == 170 + (4 + 3) * cell + 8


@pytest.mark.parametrize("name", PIPELINES)
def test_the_settings_to_copy_are_settings_of_a_generator(tried: Callable[[str], Ended], name: str) -> None:
    report = tried(name).report
    text = as_toml(report.settings, f"model.generators.{name}")
    copied = tomllib.loads(text)["model"]["generators"][name]
    assert copied == report.settings
    settings = GeneratorSettings.model_validate(copied)
    assert settings.max_batch_size == report.largest_batch_that_pays
    assert settings.defaults.num_inference_steps == report.defaults.num_inference_steps
    assert (settings.ip_adapter is not None) == (name != "klein")


def test_an_image_that_does_not_come_from_its_seed_is_a_broken_promise(
    small_models: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pipeline_stable_diffusion, "randn_tensor", lambda shape, generator, device, dtype: torch.randn(shape)
    )
    generators = {"sd": {"source": str(small_models / "sd15"), "max_batch_size": 2}}
    arguments = ["sd", "--steps", "2", "--repeats", "1", "--references", str(pictures), "--out", str(tmp_path)]
    ended = run(*arguments, "--json", generators=generators)
    assert ended.code == 1
    assert not ended.report.passed
    assert ended.outcomes("repeatable") == {"none": Outcome.FAIL}
    assert ended.outcomes("random_numbers_are_seeded")["none"] is Outcome.FAIL
    assert ended.outcomes("random_numbers_are_seeded")["img2img"] is Outcome.PASS


def test_a_generator_is_compared_with_others(small_models: Path, pictures: Path, tmp_path: Path) -> None:
    exact = {"source": str(small_models / "sd15"), "max_batch_size": 1, "dtype": "float32"}
    others = {"same": exact, "half": exact | {"dtype": "bfloat16"}, "gone": exact | {"source": str(tmp_path)}}
    against = [argument for name in ("same", "gone", "half") for argument in ("--against", name)]
    arguments = ["exact", *against, "--steps", "2", "--repeats", "1", "--references", str(pictures), "--out"]
    ended = run(*arguments, str(tmp_path), "--json", generators={"exact": exact} | others)
    same, half = ended.report.comparisons
    assert [(image.mode, image.psnr_db, image.same) for image in same.images] == [
        (mode, None, True) for mode in ("img2img", "caption", "none")
    ]
    assert half.dtype == "bfloat16"
    assert all(image.psnr_db is not None and image.difference > 1e-3 for image in half.images)
    assert ended.code == 1
    assert list(ended.report.comparison_errors) == ["gone"]
    assert "ModelLoadError" in ended.report.comparison_errors["gone"]
    printed = io.StringIO()
    print_report(ended.report, Console(file=printed, width=80))
    table = printed.getvalue().partition("the same images")[2].partition("gone was not compared: ModelLoadError")[0]
    assert table.count("identical") == len(same.images)
    assert table.count(" dB") == len(half.images)
    assert all(name in table for name in ("exact", "same", "half", "img2img:", "caption:", "none:"))


# --- models that fail ---------------------------------------------------------------------------------------------

FAKE = {"fake": {"kind": "fake", "cost_ms": 4, "max_batch_size": 4, "max_references": 2}}
REFERENCES = tuple(
    Reference(vector=np.full(4, seed, np.float32), image=Image.new("RGB", (8, 8)), weight=1.0, caption=f"thing {seed}")
    for seed in range(2)
)


class Honest(FakeGenerator):
    """Uses no reference of weight 0 or of scale 0, and stronger ones more. All else is as in a fake generator."""

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        return [self._image(request) for request in self._run(requests, on_step)]

    def _run(self, requests: Sequence[ImageRequest], on_step: OnStep) -> Sequence[ImageRequest]:
        super().generate(requests, on_step)
        return requests

    def _image(self, request: ImageRequest) -> np.ndarray:
        scale = 1.0 if request.mode is not Mode.IMAGE_PROMPT else request.ip_adapter_scale
        used = [each for each in request.references if each.weight * scale > 0]
        bare = replace(request, references=(), mode=Mode.NONE)
        image = super().generate([bare], lambda step, steps: True)[0].astype(float)
        for each in used:
            other = replace(bare, prompt=each.caption or "", negative_prompt=request.mode.value)
            image += each.weight * scale * super().generate([other], lambda step, steps: True)[0] / 4
        return (image / 2).astype(np.uint8)


class NotRepeatable(Honest):
    calls = 0

    def _image(self, request: ImageRequest) -> np.ndarray:
        self.calls += 1
        return super()._image(replace(request, seed=self.calls))


class BatchDependent(Honest):
    def _run(self, requests: Sequence[ImageRequest], on_step: OnStep) -> Sequence[ImageRequest]:
        texts = {request.prompt for request in super()._run(requests, on_step)}
        return [replace(request, prompt="".join(sorted(texts))) for request in requests]


class BrokenByNestedCalls(Honest):
    depth = 0

    def _run(self, requests: Sequence[ImageRequest], on_step: OnStep) -> Sequence[ImageRequest]:
        before = self.depth
        self.depth += 1
        super()._run(requests, on_step)
        broken, self.depth = self.depth != before + 1, self.depth if before else 0
        return [replace(request, seed=99) for request in requests] if broken else requests


class Blind(Honest):
    def _image(self, request: ImageRequest) -> np.ndarray:
        return super()._image(replace(request, references=()))


class Weightless(Honest):
    def _image(self, request: ImageRequest) -> np.ndarray:
        references = tuple(replace(each, weight=1.0) for each in request.references)
        return super()._image(replace(request, references=references))


class Inverted(Honest):
    def _image(self, request: ImageRequest) -> np.ndarray:
        references = tuple(replace(each, weight=each.weight and 1.5 - each.weight) for each in request.references)
        return super()._image(replace(request, references=references))


class Unstoppable(Honest):
    def _run(self, requests: Sequence[ImageRequest], on_step: OnStep) -> Sequence[ImageRequest]:
        return super()._run(requests, lambda step, steps: on_step(step, steps) or True)


class SlowToStop(Honest):
    def _run(self, requests: Sequence[ImageRequest], on_step: OnStep) -> Sequence[ImageRequest]:
        def late(step: int, steps: int) -> bool:
            if not (goes_on := on_step(step, steps)):
                time.sleep(0.5)
            return goes_on

        return super()._run(requests, late)


class OneSize(Honest):
    def _image(self, request: ImageRequest) -> np.ndarray:
        if request.width != request.height:
            raise ValueError("this model draws squares")
        return super()._image(request)


BROKEN = {
    "repeatable": NotRepeatable,
    "alone_equals_batched": BatchDependent,
    "interrupted_equals_alone": BrokenByNestedCalls,
    "references_change_image": Blind,
    "weight_0_leaves_out": Weightless,
    "weights_are_monotone": Inverted,
    "cancel_stops_within_a_step": Unstoppable,
    "other_sizes_draw": OneSize,
}


def trial_of(model: FakeGenerator, **changes: Any) -> Trial:
    trial = Trial(
        model=model,
        settings=GeneratorSettings.model_validate(FAKE["fake"]),
        prompt="a red apple",
        references=REFERENCES,
        width=model.defaults.width,
        height=model.defaults.height,
        steps=2,
        load_s=0.0,
        warm_up_s=0.0,
    )
    return replace(trial, **changes)


def loaded(kind: type[FakeGenerator]) -> FakeGenerator:
    settings = ModelSettings.model_validate({"generators": FAKE, "default_generator": "fake"})
    model = kind(**vars(FakeGenerator.load("fake", settings)))
    model.capabilities = model.capabilities.model_copy(update={"modes": ["image_prompt", "none"]})
    return model


def failed(kind: type[FakeGenerator]) -> set[str]:
    checks = list(Promises(trial_of(loaded(kind))).checks())
    return {check.name for check in checks if check.outcome is Outcome.FAIL}


def test_an_honest_model_fails_no_check() -> None:
    assert failed(Honest) == set()


@pytest.mark.parametrize("promise", BROKEN)
def test_a_broken_promise_is_found(promise: str) -> None:
    assert promise in failed(BROKEN[promise])


def test_a_device_that_lags_behind_is_found() -> None:
    assert failed(SlowToStop) == {"cancel_stops_within_a_step"}


class LowMemory(Honest):
    """Has memory for two images, or for one with two references; slices save memory for three."""

    slicing = False

    def memory_savers(self, images: int) -> Sequence[str]:
        return ["vae_slicing"] if images > 1 else []

    @contextmanager
    def saving_memory(self, savers: Sequence[str]) -> Iterator[None]:
        self.slicing = "vae_slicing" in savers
        try:
            yield
        finally:
            self.slicing = False

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        if sum(1 + len(request.references) for request in requests) > (4 if self.slicing else 2):
            raise ModelOutOfMemoryError("too large")
        return super().generate(requests, on_step)


def test_a_call_that_does_not_fit_is_a_row_and_the_table_goes_on() -> None:
    rows = list(measurements(trial_of(loaded(LowMemory)), repeats=1))
    assert [(row.images, row.references) for row in rows] == [(1, 0), (2, 0), (4, 0), (1, 1), (1, 2), (4, 2)]
    assert [row.out_of_memory for row in rows] == [False, False, False, False, True, True]
    assert rows[2].memory_savers == ["vae_slicing"]
    assert rows[4].seconds_per_image is None
    assert largest_batch_that_pays(rows) in (1, 2), "the savers of 4 change pixels"


def test_the_command_goes_on_after_a_call_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(GENERATORS, "fake", LowMemory)
    ended = run("fake", "--steps", "2", "--references", str(pictures), "--out", str(tmp_path), generators=FAKE)
    assert "out of memory" in ended.out
    assert "[model.generators.fake]" in ended.out
    assert f"wrote {tmp_path / 'sheet.png'}" in ended.out
    assert ended.code == 1, "two references in one image are a promise of its capabilities"


class NeedsSlices(LowMemory):
    """Has memory for one image with two references only with slices."""

    def memory_savers(self, images: int) -> Sequence[str]:
        return ["vae_slicing"]


def test_images_that_need_a_memory_saver_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(GENERATORS, "fake", NeedsSlices)
    arguments = ["fake", "--against", "second", "--steps", "2", "--no-checks", "--json", "--out", str(tmp_path)]
    ended = run(*arguments, "--references", str(pictures), generators=FAKE | {"second": FAKE["fake"]})
    assert ended.report.comparison_errors == {"second": "fake is out of memory: too large"}
    assert ended.report.measurements
    assert ended.code == 1


class NeedsTheWholeDevice(Honest):
    """Cannot be loaded while another model is in memory. Like a pipeline, it is part of a reference cycle."""

    loaded: ClassVar[list[weakref.ref["NeedsTheWholeDevice"]]] = []
    fails: ClassVar[str | None] = None
    """Name of the generator that draws nothing."""
    itself: "NeedsTheWholeDevice"

    @classmethod
    def load(cls, name: str, settings: ModelSettings) -> "NeedsTheWholeDevice":
        assert not any(model() for model in cls.loaded)
        model = super().load(name, settings)
        assert isinstance(model, cls)
        model.itself = model
        cls.loaded.append(weakref.ref(model))
        return model

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        if self.name == self.fails:
            raise RuntimeError("no kernel")
        return super().generate(requests, on_step)


@pytest.mark.parametrize("fails", [None, "second"])
def test_a_model_is_released_before_the_next_one_is_loaded(
    monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path, fails: str | None
) -> None:
    monkeypatch.setitem(GENERATORS, "fake", NeedsTheWholeDevice)
    monkeypatch.setattr(NeedsTheWholeDevice, "loaded", [])
    monkeypatch.setattr(NeedsTheWholeDevice, "fails", fails)
    generators = FAKE | dict.fromkeys(("second", "third"), FAKE["fake"])
    arguments = ["fake", "--against", "second", "--against", "third", "--steps", "2", "--no-checks", "--json"]
    ended = run(*arguments, "--references", str(pictures), "--out", str(tmp_path), generators=generators)
    assert len(NeedsTheWholeDevice.loaded) == 3
    assert [other.model for other in ended.report.comparisons] == [
        each for each in ("second", "third") if each != fails
    ]
    assert {check.name for check in ended.report.checks} == {"draws"}
    assert not ended.report.promises_checked
    assert ended.code == (0 if fails is None else 1)


def test_the_settings_to_copy_have_no_key_of_an_engine() -> None:
    engine = {"urls": ["http://10.0.0.7/v1"], "model": "flux", "api_key": "secret"}
    defaults = {"num_inference_steps": 4, "guidance_scale": 1}
    settings = GeneratorSettings.model_validate({"kind": "openai", "engine": engine, "defaults": defaults})
    found = found_settings(trial_of(loaded(Honest), settings=settings), max_batch_size=None)
    assert found["engine"] == {"urls": ["http://10.0.0.7/v1"], "model": "flux"}, (
        "a masked key would replace the true one"
    )


def row(images: int, seconds: float | None, *, references: int = 0, savers: Sequence[str] = ()) -> Measurement:
    return Measurement(
        images=images,
        references=references,
        mode="none",
        out_of_memory=seconds is None,
        seconds_per_image=seconds,
        memory_savers=list(savers),
    )


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([row(1, 1.0), row(2, 0.7), row(4, 0.5)], 4),
        ([row(1, 1.0), row(2, 0.97), row(4, 0.96)], 1),
        ([row(1, 1.0), row(2, 0.97), row(4, 0.94)], 4),
        ([row(1, 1.0), row(2, 0.8), row(4, 0.79)], 2),
        ([row(1, 1.0), row(2, 0.7), row(4, 0.5, savers=["vae_slicing"])], 2),
        ([row(1, 1.0), row(2, 0.7), row(4, None)], 2),
        ([row(1, None), row(2, None)], None),
        ([row(1, 1.0), row(4, 0.1, references=3)], 1),
    ],
)
def test_a_larger_batch_pays_if_it_saves_5_percent_per_image(rows: list[Measurement], best: int | None) -> None:
    assert largest_batch_that_pays(rows) == best


def test_the_verdict_of_the_probe_is_a_sentence() -> None:
    model = loaded(Honest)
    assert probe_verdict(trial_of(model)) == [
        "A batch changes no image beyond rounding.",
        "A call between two steps changes no image.",
    ]
    found = {"max_batch_size": 1, "batching_changes_images": True, "interruption_changes_images": True}
    model.capabilities = model.capabilities.model_copy(update=found)
    assert probe_verdict(trial_of(model)) == [
        "The other images of a batch change an image, so each image has its own call.",
        "A call between two steps changes an image, so no batch is interrupted.",
    ]
    outcomes = {check.name: check.outcome for check in Promises(trial_of(model)).checks()}
    assert outcomes["alone_equals_batched"] is Outcome.SKIPPED
    assert outcomes["interrupted_equals_alone"] is Outcome.SKIPPED


# --- options and models that cannot be loaded ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "generators", "message"),
    [
        (["absent"], FAKE, "error: No model of that name is configured. 'absent' is not one of fake."),
        (["empty"], {"empty": {"source": "{folder}"}}, "error: Pipeline "),
        (["fake", "--references", "{folder}"], FAKE, "error: {folder} has no pictures"),
        (["fake", "--against", "absent"], FAKE, "error: "),
    ],
    ids=["unknown name", "no pipeline", "no pictures", "unknown name to compare with"],
)
def test_a_model_that_cannot_be_tried_ends_with_2_and_one_line(
    tmp_path: Path, arguments: list[str], generators: dict[str, Any], message: str
) -> None:
    filled = json.loads(json.dumps(generators).replace("{folder}", str(tmp_path)))
    ended = run(*[each.replace("{folder}", str(tmp_path)) for each in arguments], generators=filled)
    assert ended.code == 2
    assert ended.err.startswith(message.replace("{folder}", str(tmp_path)))
    assert len(ended.err.splitlines()) == 1
    assert ended.out == ""


def test_more_steps_than_the_model_takes_end_with_2(small_models: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = ["sd15", "--steps", "2000", "--references", str(pictures), "--out", str(tmp_path)]
    ended = run(*arguments, generators={"sd15": {"source": str(small_models / "sd15")}})
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("error: The model's scheduler takes at most 1000 steps")
