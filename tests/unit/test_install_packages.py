"""The first `make demo` shows pip's progress in one line, and pip's own words where it fails."""

import os
import pty
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from ops.local.stack import REPOSITORY

INSTALL = [sys.executable, str(REPOSITORY / "ops" / "install_packages.py")]
HASH = f"--hash=sha256:{'0' * 64}"


def test_a_terminal_shows_one_line_that_is_replaced(tmp_path: Path) -> None:
    lock = tmp_path / "some.lock"
    lock.write_text(f"click=={version('click')} {HASH}\n")  # installed already, so nothing is downloaded
    controller, side = pty.openpty()
    done = subprocess.run([*INSTALL, str(lock)], stdout=side, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(side)
    shown = os.read(controller, 100_000).decode()
    os.close(controller)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown.strip().count("\n") == 0
    assert "All packages of some.lock are installed." in shown


def test_a_failure_shows_the_end_of_pips_output(tmp_path: Path) -> None:
    lock = tmp_path / "some.lock"
    lock.write_text(f"click=={version('click')}\nthere is no such line {HASH}\n")
    done = subprocess.run([*INSTALL, str(lock)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "ERROR: " in done.stderr
    assert "install.log" in done.stderr
