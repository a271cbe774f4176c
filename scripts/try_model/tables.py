"""Prints a report for people."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scripts.try_model.measurements import GAIN
from scripts.try_model.report import Check, ComparedImage, Measurement, Outcome, TryReport
from scripts.try_model.settings_text import as_toml

COLOURS = {Outcome.PASS: "green", Outcome.FAIL: "bold red", Outcome.SKIPPED: "dim"}


def print_report(report: TryReport, console: Console) -> None:
    """Print the model, its measurements, its checks and the settings to copy."""
    console.print(_model(report))
    console.print(_measurements(report))
    if report.largest_batch_that_pays is not None:
        console.print(
            f"The largest batch that pays: {report.largest_batch_that_pays}. A larger one pays if it saves at least "
            f"{GAIN:.0%} of the seconds per image, and needs no memory saver."
        )
    console.print(_checks(report))
    if not report.promises_checked:
        console.print("The other promises were not checked: --no-checks.")
    if report.comparisons:
        console.print(_comparisons(report))
    for name, error in report.comparison_errors.items():
        console.print(f"{name} was not compared: {error}", style="bold red", markup=False)
    console.print("Settings for afterimage.toml:\n")
    console.print(
        as_toml(report.settings, f"model.generators.{report.model}"), markup=False, highlight=False, soft_wrap=True
    )
    if report.sheet is not None:
        console.print(f"\nwrote [bold]{escape(report.sheet)}")


def _model(report: TryReport) -> Table:
    known, defaults = report.capabilities, report.defaults
    size_rule = (
        f"multiples of {known.size_multiple}, near the native size" if known.any_size else "the native size only"
    )
    memory = f" of {_gib(report.device_bytes)}" if report.device_bytes else ""
    call = report.reference_call
    references = f"at most {known.max_references}"
    references += f", {known.reference_side} px per side" if known.reference_side else ""
    if known.reference_side_of_several != known.reference_side:
        references += f" ({known.reference_side_of_several} px where they stand for several things)"
    references += f", in a call of shape {call['shape']}" if call else ""
    references += ", weights act on the attention" if known.weighs_references else ""
    references += ", one is needed" if known.needs_reference else ""
    rows = {
        "pipeline": f"{known.pipeline}, {known.dtype} on {known.device} ({report.device_name})",
        "modes": ", ".join(known.modes),
        "size": f"native {known.native_width} x {known.native_height}; {size_rule}",
        "defaults": f"{defaults.width} x {defaults.height}, {defaults.num_inference_steps} steps, "
        f"guidance {defaults.guidance_scale:g}, scheduler {defaults.scheduler or 'of the model'}",
        "guidance": f"{'yes' if known.supports_guidance else 'no'}; negative prompt: "
        f"{'yes' if known.supports_negative_prompt else 'no'}",
        "schedulers": ", ".join(known.schedulers) or "only the model's own",
        "LoRAs": ", ".join(known.loras) or "-",
        "references": references if set(known.modes) - {"none", "caption"} else "their captions only",
        "previews": report.previews.detail if report.previews.available else f"none: {report.previews.detail}",
        "probe": " ".join(report.probe),
        "start": f"loaded in {report.load_s:.1f} s, warm after {report.warm_up_s:.1f} s more",
        "memory at rest": _gib(report.rest_bytes) + memory,
    }
    table = Table(title=f"{report.model} (Afterimage {report.version})", title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _measurements(report: TryReport) -> Table:
    title = f"{report.width} x {report.height}, {report.num_inference_steps} steps"
    table = Table("images per call", "references each", "mode", "s per image", "peak memory", "", title=title)
    table.title_justify = "left"
    for row in report.measurements:
        table.add_row(*_cells(row))
    return table


def _cells(row: Measurement) -> list[str]:
    seconds = "out of memory" if row.seconds_per_image is None else f"{row.seconds_per_image:.3f}"
    note = f"needed {', '.join(row.memory_savers)}" if row.memory_savers else ""
    return [str(row.images), str(row.references), row.mode, seconds, _gib(row.peak_bytes), note]


def _checks(report: TryReport) -> Table:
    table = Table("promise", "mode", "", "difference", "what was seen", title="promises", title_justify="left")
    for check in report.checks:
        table.add_row(*_cells_of_check(check), style=COLOURS[check.outcome])
    return table


def _comparisons(report: TryReport) -> Table:
    """One row per generator. Its images are compared with those of the first row."""
    one = report.measurements[0]
    table = Table(title="the same images by other generators", title_justify="left")
    table.add_column("generator", no_wrap=True)
    for column in ("s to\nload", "memory\nat rest", "peak, one\nimage", "s per\nimage", "images"):
        table.add_column(column)
    loaded = (f"{report.load_s:.1f}", _gib(report.rest_bytes), _gib(one.peak_bytes), _cells(one)[3])
    table.add_row(_generator(report.model, report.capabilities.dtype), *loaded)
    for other in report.comparisons:
        measured = other.measurement
        loaded = (f"{other.load_s:.1f}", _gib(other.rest_bytes), _gib(measured.peak_bytes), _cells(measured)[3])
        table.add_row(_generator(other.model, other.dtype), *loaded, "\n".join(map(_compared, other.images)))
    return table


def _generator(name: str, dtype: str) -> str:
    return "\n".join([name, *dtype.split(", ")])


def _compared(image: ComparedImage) -> str:
    if image.psnr_db is None:
        return f"{image.mode}: identical"
    return f"{image.mode}: {image.psnr_db:.1f} dB" + ("" if image.same else ", another image")


def _cells_of_check(check: Check) -> list[str]:
    found = "" if check.difference is None else f"{check.difference:.1e}"
    found += "" if check.tolerance is None else f" / {check.tolerance:.0e}"
    return [check.name.replace("_", " "), check.mode or "", check.outcome.value, found, escape(check.detail)]


def _gib(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 2**30:.2f} GiB"
