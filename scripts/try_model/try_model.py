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
from scripts.try_model.report import Check, Measurement, Outcome, TryReport
from scripts.try_model.settings_text import found_settings
from scripts.try_model.sheet import draw_sheet
from scripts.try_model.trial import Options, Trial
from shared.contracts.generation import Mode
from shared.errors import BaseAppException
from shared.settings import Settings
from shared.version import VERSION
from worker_service.models.pipelines.probe import REFUSALS

SHEET = "sheet.png"


def try_model(options: Options, settings: Settings, out: Path, *, on_progress: Callable[[str], None]) -> TryReport:
    """Try one generator, and write its sheet into the folder `out`.

    With `options.against`, then load the other generator in its place, and compare. on_progress: called with what is
    done next.

    Raises:
        ModelNotFoundError: the settings have no generator of that name.
        ModelLoadError: the generator cannot be loaded; the message gives the cause.
        ConfigurationError, SourceError, InvalidImageError: there are no references, or they cannot be read.
        AcceleratorLostError: the device no longer responds.
        OSError: the sheet cannot be written.
    """
    if options.against is not None:
        settings.model.generator(options.against)  # before the work of minutes, not after it
    report, drawn = _try_one(options, settings, out, on_progress)
    if drawn is None or options.against is None:
        return report
    on_progress(f"loading {options.against}")
    size, steps = (report.width, report.height), report.num_inference_steps
    try:
        other = Trial.load(replace(options, name=options.against, size=size, steps=steps), settings)
        comparison = compare(drawn, other, repeats=options.repeats)
    except (BaseAppException, *REFUSALS) as error:
        return report.model_copy(update={"comparison_error": f"{type(error).__name__}: {error}", "passed": False})
    return report.model_copy(update={"comparison": comparison})


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
    for check in promises.checks():
        checks.append(check)
        on_progress(f"checked {check.name}, mode {check.mode}: {check.outcome.value}")
    drawn = draw_each_mode(trial) if options.against is not None and _passed(checks) else None
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
        passed=_passed(checks),
        comparison_error="a promise is broken" if options.against is not None and drawn is None else None,
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
