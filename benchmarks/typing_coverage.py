"""How much of the product is typed?

    .venv/bin/python -m benchmarks.typing_coverage

Runs mypy as `make lint` does (strict, on all code). Counts functions with complete annotations from mypy's report, and
lines with an ignored error (`type: ignore`). Nearly all of these are calls of untyped libraries.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.conditions import report


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        check = subprocess.run(
            [sys.executable, "-m", "mypy", "--linecount-report", folder, "--cache-dir", folder],
            capture_output=True,
            text=True,
        )
        # The first line is the sum, the others one module each: lines, annotated lines, functions, annotated functions.
        total, *modules = (Path(folder) / "linecount.txt").read_text().splitlines()
    functions, annotated = (int(number) for number in total.split()[2:4])
    ignored = sum(
        line.count("# type: ignore")
        for path in subprocess.check_output(["git", "ls-files", "*.py"], text=True).splitlines()
        for line in Path(path).read_text().splitlines()
    )
    figures: dict[str, object] = {
        "mypy --strict": check.stdout.strip().splitlines()[-1],
        "functions with complete annotations": f"{annotated} of {functions}",
        "lines with an ignored error": ignored,
    }
    report("Typed code", figures, modules=len(modules))
    raise SystemExit(check.returncode)


if __name__ == "__main__":
    main()
