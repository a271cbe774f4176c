"""The packages of a worker without NVIDIA's libraries, and the digests of the images of others."""

import os
import re
import shutil
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ops.docker.cpu_lock import FOR_GPUS, split

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "ops" / "docker" / "worker.lock").read_text()
DIGEST = "sha256:" + "ab" * 32


def names_in(lock: str) -> set[str]:
    return set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE))


def test_an_image_for_cpus_has_all_packages_but_those_for_gpus() -> None:
    hashed, from_index = split(LOCK)
    assert names_in(from_index) == {"torch", "torchvision"}
    left_out = names_in(LOCK) - names_in(hashed) - names_in(from_index)
    assert {"triton", "nvidia-cublas", "cuda-bindings"} <= left_out
    assert all(name.startswith(("nvidia-", "cuda-")) or name == "triton" for name in left_out)
    # pip would refuse an entry without a hash.
    assert all(entry in LOCK for entry in hashed.strip().split("\n"))
    assert len(re.findall(r"^[\w.-]+==", hashed, re.MULTILINE)) == len(re.findall(r"==.+\\\n    --hash", hashed))


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_what_torch_needs_on_a_cpu_is_in_the_image(package: str) -> None:
    hashed, from_index = split(LOCK)
    installed = {canonicalize_name(name) for name in names_in(hashed) | names_in(from_index)}
    environment = {"sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    needed = [Requirement(text) for text in requires(package) or []]
    names = {canonicalize_name(one.name) for one in needed if one.marker is None or one.marker.evaluate(environment)}
    assert {name for name in names if not FOR_GPUS.fullmatch(name)} <= installed


def pin(folder: Path, env: str) -> tuple[dict[str, str], list[str]]:
    """Run `ops/pin_images.sh` with a stand-in for docker. Return the variables of .env, and the pulled images."""
    (folder / "ops").mkdir(exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("ops/pin_images.sh", "docker-compose.yml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".env").write_text(env)
    docker = folder / "bin" / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = pull ]; then echo "$3" >>{folder}/pulled\n'
        f'else echo "name-of-the-registry@{DIGEST}"; fi\n'
    )
    docker.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["sh", str(folder / "ops" / "pin_images.sh")], env=environment, check=True, capture_output=True)
    lines = (folder / ".env").read_text().splitlines()
    assert len(lines) == len(set(lines))
    return dict(line.split("=", 1) for line in lines if line), (folder / "pulled").read_text().splitlines()


def test_the_images_of_others_are_pinned_by_digest(tmp_path: Path) -> None:
    variables, pulled = pin(tmp_path, "COMPOSE_PROFILES=cpu\nREDIS_IMAGE=mirror.example.com:5000/redis:8\n")
    assert variables["POSTGRES_IMAGE"] == f"pgvector/pgvector:pg18@{DIGEST}"
    assert variables["REDIS_IMAGE"] == f"mirror.example.com:5000/redis:8@{DIGEST}"
    assert variables["COMPOSE_PROFILES"] == "cpu"
    assert variables.keys() - {"COMPOSE_PROFILES"} == {
        *("ALERTMANAGER_IMAGE", "BASE_IMAGE", "GRAFANA_IMAGE", "POSTGRES_IMAGE"),
        *("PROMETHEUS_IMAGE", "PROXY_IMAGE", "REDIS_IMAGE"),
    }
    assert "pgvector/pgvector:pg18" in pulled


def test_pinning_again_follows_the_tag(tmp_path: Path) -> None:
    old = f"REDIS_IMAGE=redis:8@sha256:{'00' * 32}\n"
    variables, pulled = pin(tmp_path, old)
    assert "redis:8" in pulled
    assert variables["REDIS_IMAGE"] == f"redis:8@{DIGEST}"
