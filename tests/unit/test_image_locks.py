"""Each lock of the images, installed alone into a clean environment: every command of its containers can start."""

import os
import subprocess
import venv
from pathlib import Path

import pytest

from tests.unit.test_production_files import KINDS, OURS, ROOT

NO_SERVERS = {
    "AFTERIMAGE_DATABASE__URL": "postgresql+psycopg2://nobody@127.0.0.1:1/none",
    "AFTERIMAGE_QUEUE__URL": "redis://127.0.0.1:1/0",
    "AFTERIMAGE_CACHE__URL": "redis://127.0.0.1:1/1",
    "AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true",
    "AFTERIMAGE_API__PORT": "0",
    "FLOWER_PORT": "0",
}
START_S = 45
SMALL = [kind for kind in KINDS if kind != "worker"]
"""The worker's packages are 6 GB, and those that all other tests run with."""


@pytest.mark.extended
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", SMALL)
def test_the_packages_of_a_lock_start_the_commands_of_its_containers(kind: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    lock = str(ROOT / "ops" / "docker" / f"{kind}.lock")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", lock], check=True)
    environment = (
        os.environ | NO_SERVERS | {"PYTHONPATH": str(ROOT), "AFTERIMAGE_STORAGE__URL": f"file://{tmp_path}/blobs"}
    )
    commands = {tuple(service["command"]) for service in OURS.values() if f"afterimage-{kind}:" in service["image"]}
    for command in sorted(commands):
        arguments = [each for each in command[1:] if not each.startswith("--conf=")]
        with subprocess.Popen(
            [python, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=START_S)
            except subprocess.TimeoutExpired:  # it serves, or waits for a server
                process.kill()
                output, _ = process.communicate()
        assert "ImportError" not in output, (command, output)
        assert "ModuleNotFoundError" not in output, (command, output)
        assert "No module named" not in output, (command, output)
