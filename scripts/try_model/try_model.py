"""The whole trial of one generator: load, draw the sheet, measure, check the promises, report."""

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from scripts.try_model import memory
from scripts.try_model.comparison import Drawn, compare, draw_each_mode
from scripts.try_model.measurements import largest_batch_that_pays, measurements
from scripts.try_model.promises import Promises, probe_verdict
from scripts.try_model.report import Check, Comparison, Measurement, Outcome, TryReport
from scripts.try_model.settings_text import found_settings
from scripts.try_model.sheet import draw_sheet
from scripts.try_model.trial import Options, Trial
from shared.contracts.generation import Mode
from shared.errors import BaseAppException, ModelOutOfMemoryError
from shared.settings import Settings
from shared.version import VERSION
from worker_service.models.pipelines.probe import REFUSALS

SHEET = "sheet.png"


def try_model(options: Options, settings: Settings, out: Path, *, on_progress: Callable[[str], None]) -> TryReport:
    """Try one generator, and write its sheet into the folder `out`.

    Then load each generator of `options.against` in its place, one after another, and compare. on_progress: called
    with what is done next.

    Raises:
        ModelNotFoundError: the settings have no generator of that name.
        ModelLoadError: the generator cannot be loaded; the message gives the cause.
        ConfigurationError, SourceError, InvalidImageError: there are no references, or they cannot be read.
        AcceleratorLostError: the device no longer responds.
        OSError: the sheet cannot be written.
    """
    for name in options.against:
        settings.model.generator(name)  # before the work of minutes, not after it
    report, drawn = _try_one(options, settings, out, on_progress)
    if drawn is None:
        return report
    same = replace(options, size=(report.width, report.height), steps=report.num_inference_steps)
    comparisons: list[Comparison] = []
    errors: dict[str, str] = {}
    for name in options.against:
        on_progress(f"loading {name}")
        memory.free_unused()  # of the model before it: a GPU need not fit two
        try:
            comparisons.append(_compared(drawn, replace(same, name=name), settings))
        except (BaseAppException, *REFUSALS) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return report.model_copy(
        update={"comparisons": comparisons, "comparison_errors": errors, "passed": report.passed and not errors}
    )


def _compared(drawn: Drawn, options: Options, settings: Settings) -> Comparison:
    """Load a generator, and compare it. It is free again at the end, and after an error."""
    return compare(drawn, Trial.load(options, settings, warm_up=False), repeats=options.repeats)


def _try_one(
    options: Options, settings: Settings, out: Path, on_progress: Callable[[str], None]
) -> tuple[TryReport, Drawn | None]:
    """The report, and images to compare with if the options name another generator. The model is free again."""
    # 1. Load, and measure the memory before anything else has run.
    out.mkdir(parents=True, exist_ok=True)
    trial = Trial.load(options, settings)
    rest_bytes = memory.bytes_at_rest(trial.device)

    # 2. Draw the sheet with the steps that jobs have.
    sheet, checks = draw_sheet(trial, on_mode=lambda mode: on_progress(f"drawing the sheet: {mode.value}"))
    sheet.save(out / SHEET)

    # 3. Measure.
    measured: list[Measurement] = []
    on_progress("measuring")
    for row in measurements(trial, repeats=options.repeats):
        measured.append(row)
        on_progress(f"measured {row.images} image(s) with {row.references} reference(s)")
    best = largest_batch_that_pays(measured)

    # 4. Check the promises.
    promises = Promises(trial)
    for check in promises.checks() if options.checks_promises else ():
        checks.append(check)
        on_progress(f"checked {check.name}, mode {check.mode}: {check.outcome.value}")
    drawn, not_compared = None, dict.fromkeys(options.against, "a promise is broken")
    if options.against and _passed(checks):
        try:
            drawn, not_compared = draw_each_mode(trial), {}
        except ModelOutOfMemoryError as error:  # memory savers, which the sheet may have used, change the images
            not_compared = dict.fromkeys(options.against, f"{options.name} is out of memory: {error}")
    report = TryReport(
        model=options.name,
        version=VERSION,
        device_name=_device_name(trial.device),
        device_bytes=torch.cuda.mem_get_info(trial.device)[1] if trial.device.type == "cuda" else None,
        capabilities=trial.capabilities,
        defaults=trial.model.defaults,
        probe=probe_verdict(trial),
        reference_call=_reference_call(trial),
        previews=promises.previews(),
        load_s=trial.load_s,
        warm_up_s=trial.warm_up_s,
        rest_bytes=rest_bytes,
        width=trial.width,
        height=trial.height,
        num_inference_steps=trial.steps,
        measurements=measured,
        largest_batch_that_pays=best,
        checks=checks,
        promises_checked=options.checks_promises,
        passed=_passed(checks) and not not_compared,
        comparison_errors=not_compared,
        sheet=str(out / SHEET),
        settings=found_settings(trial, max_batch_size=best),
    )
    return report, drawn


def _passed(checks: list[Check]) -> bool:
    return all(check.outcome is not Outcome.FAIL for check in checks)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _reference_call(trial: Trial) -> dict[str, object] | None:
    if Mode.REFERENCE not in trial.modes:
        return None
    return trial.model.reference_call(trial.request(Mode.REFERENCE, references=len(trial.references)))
