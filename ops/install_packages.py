"""Install the packages of a lock file with pip, and show the progress in one line.

    python ops/install_packages.py requirements.lock

It uses only the standard library, because it runs in an empty environment. The whole output of pip is kept in
`install.log` of the environment. Where pip fails, the end of it is shown.
"""

import re
import subprocess
import sys
from pathlib import Path

LOG = Path(sys.prefix) / "install.log"
SHOWN_AFTER_FAILURE = 20
"""Last lines of pip's output that are shown."""
OPTIONS = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--require-hashes")


def main(lock: Path) -> int:
    total = len(re.findall(r"^[\w.-]+==", lock.read_text(), re.MULTILINE))
    command = [sys.executable, "-m", "pip", "install", *OPTIONS, "-r", str(lock)]
    lines: list[str] = []
    done = 0
    with (
        LOG.open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            log.write(line)
            lines.append(line)
            done += line.startswith(("Collecting ", "Requirement already satisfied: "))
            if name := re.match(r"(?:Collecting|Downloading) ([\w.-]+)", line):
                show(f"{min(done, total)} of {total} packages: {name[1]}")
            elif line.startswith("Installing collected packages"):
                show(f"installing {total} packages, which takes some minutes")
    if pip.returncode:
        show("")
        print(*lines[-SHOWN_AFTER_FAILURE:], f"The whole output of pip is in {LOG}.", sep="", file=sys.stderr)
        return pip.returncode
    show("")
    print(f"All packages of {lock.name} are installed.", flush=True)
    return 0


def show(text: str) -> None:
    """Replace the line on a terminal; elsewhere print nothing."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text[:78]}", end="", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
