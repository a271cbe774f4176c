"""Load one configured generator as a worker does, measure it, and check that it keeps the service's promises here.

    python -m scripts.try_model sdxl
    python -m scripts.try_model sdxl --size 1024x768 --steps 20

    python -m scripts.try_model klein --against klein-int8 --against klein-group
    python -m scripts.try_model klein --json > klein.json

It prints the model's abilities, and its memory and seconds by images per call and by number of references. It names the
largest batch that pays, and prints the settings to copy. It draws sheet.png with one row of images per mode. It needs
neither database nor broker, and works on CPU and CUDA. Run it for each new machine, model or setting, while no worker
uses the device.
"""

import argparse
from pathlib import Path

from rich.console import Console

from scripts.console import ExitCode
from scripts.index_images.sources import SourceError
from scripts.try_model.report import TryReport
from scripts.try_model.tables import print_report
from scripts.try_model.trial import Options
from scripts.try_model.try_model import try_model
from shared.errors import BaseAppException, ModelNotFoundError
from shared.settings import STARTER, load_settings
from worker_service.execution.watchdog import AcceleratorLostError

EXIT_CODES = """exit codes:
  0  every promise is kept
  1  a promise is broken, or the device no longer responds
  2  the options or settings are invalid, or the model cannot be loaded"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.try_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXIT_CODES,
    )
    parser.add_argument("name", help="a generator of the settings")
    parser.add_argument("--prompt", default="a red apple", help="prompt of the images (default: %(default)s)")
    parser.add_argument(
        "--references",
        type=Path,
        default=STARTER / "corpus.tar.gz",
        help="folder or WebDataset tar; pictures whose captions share words with the prompt come first "
        "(default: the starter corpus)",
    )
    parser.add_argument("--size", type=_size, metavar="WxH", help="pixels (default: the model's default)")
    parser.add_argument("--steps", type=_positive, help="denoising steps (default: the model's default)")
    parser.add_argument(
        "--repeats", type=_positive, default=3, metavar="N", help="timed calls per measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--against",
        metavar="NAME",
        action="append",
        default=[],
        help="another generator: draw the same images with it, and print how they, memory and seconds differ; may be "
        "given several times",
    )
    parser.add_argument("--no-checks", action="store_true", help="measure, but do not check the promises")
    parser.add_argument(
        "--out", type=Path, default=Path("out/try_model"), help="folder for sheet.png (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the report as JSON")
    given = parser.parse_args()
    if not given.references.exists():
        parser.error(f"{given.references} does not exist")
    options = Options(
        given.name,
        given.prompt,
        given.references,
        given.size,
        given.steps,
        given.repeats,
        against=tuple(given.against),
        checks_promises=not given.no_checks,
    )
    progress = Console(stderr=True)
    try:
        with progress.status("loading") as status:
            on_progress = status.update if progress.is_terminal else progress.out  # out: one line each, for log files
            report = try_model(options, load_settings(), given.out, on_progress=on_progress)
    except ModelNotFoundError as error:
        message = f"error: {error} {error.context['model']!r} is not one of {', '.join(error.context['models'])}."
        parser.exit(ExitCode.INVALID_INPUT, f"{message}\n")
    except (BaseAppException, SourceError, OSError) as error:
        parser.exit(ExitCode.INVALID_INPUT, f"error: {error}\n")
    except AcceleratorLostError as error:
        parser.exit(ExitCode.INCOMPLETE, f"error: the accelerator no longer responds: {error}\n")
    _print(report, as_json=given.as_json)
    raise SystemExit(int(ExitCode.DONE if report.passed else ExitCode.INCOMPLETE))


def _print(report: TryReport, *, as_json: bool) -> None:
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print_report(report, Console())


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return _positive(width), _positive(height or width)


if __name__ == "__main__":
    main()
