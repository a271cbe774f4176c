"""Digest of a generator's weights, from its files. It loads no tensor, and reads a large file once in its life."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import torch
from diffusers import DiffusionPipeline

from shared.errors import ModelLoadError
from shared.settings import GeneratorSettings
from worker_service.models.pipelines import single_file

KIND = "files"
"""Value of `Capabilities.weights_digest_kind` for digests of this module."""
CACHED_BYTES = 64 * 2**20
"""Files from this size on are read once. A smaller one is read in less than 0.1 s."""
READERS = 4
"""Files that are read at the same time."""


def of_pipeline(pipeline: DiffusionPipeline, settings: GeneratorSettings) -> str:
    """sha256 over the digests of all files from which the pipeline, its adapter and its LoRAs were loaded.

    It does not depend on dtype, device or place of the files. The same weights in other files give another digest.

    Raises:
        ModelLoadError: a part of the pipeline has no file of weights.
        OSError: a file cannot be read.
    """
    parts = [name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    files = sorted(_weight_files(settings, parts))
    with ThreadPoolExecutor(READERS) as readers:
        digests = list(readers.map(lambda named: file_digest(named[1]), files))
    digest = hashlib.sha256()
    for (name, _), of_file in zip(files, digests, strict=True):
        digest.update(f"{name} {of_file}\n".encode())
    return digest.hexdigest()


def file_digest(path: Path, *, cache: Path | None = None, cached_bytes: int = CACHED_BYTES) -> str:
    """sha256 of the file, in hex.

    The digest of a large file is kept, and counts as long as path, size and modification time of the file are the same.

    cache: folder of the kept digests; None: a folder in the cache of the model hub, which every worker can write.
    cached_bytes: size from which a file's digest is kept.
    """
    status = path.stat()
    if status.st_size < cached_bytes:
        return _read(path)
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    folder = Path(huggingface_hub.constants.HF_HOME) / "afterimage" / "digests" if cache is None else cache
    kept = folder / hashlib.sha256(key.encode()).hexdigest()
    try:
        return kept.read_text()
    except OSError:
        digest = _read(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written beside and then renamed, because several workers start at once.
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(digest)
        os.replace(file.name, kept)
    except OSError:  # a file system for reading only; the next start reads the file again
        pass
    return digest


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight_files(settings: GeneratorSettings, parts: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Each file of weights, with a name that says where it is used."""
    if settings.single_file is not None:
        file = Path(settings.single_file)
        yield "single_file", file
        replaced = parts if single_file.holds_all_parts(file) else [single_file.denoiser_name(parts)]
        parts = [part for part in parts if part not in replaced]
    adapter = settings.ip_adapter
    encoder = None if adapter is None else adapter.image_encoder_folder
    folder = _local_folder(settings.source, settings.revision)
    for part in parts:
        if part == "image_encoder" and encoder is not None:  # of the adapter
            continue
        for file in _of_variant(folder / part, settings.variant):
            yield f"{part}/{file.name}", file
    if adapter is not None:
        folder = _local_folder(adapter.source, adapter.revision)
        yield "ip_adapter", folder / adapter.subfolder / adapter.weight_name
        if encoder is not None:
            nested = folder / adapter.subfolder / encoder if "/" not in encoder else folder / encoder
            for file in _of_variant(nested, None):
                yield f"ip_adapter_encoder/{file.name}", file
    for name, lora in settings.loras.items():
        folder = _local_folder(lora.source, lora.revision)
        for file in [folder / lora.weight_name] if lora.weight_name else folder.glob("*.safetensors"):
            yield f"lora/{name}", file


def _local_folder(source: str, revision: str | None) -> Path:
    """The folder of the source, or the one in which the model hub's cache keeps it."""
    if Path(source).is_dir():
        return Path(source)
    return Path(huggingface_hub.snapshot_download(source, revision=revision, local_files_only=True, allow_patterns=[]))


def _of_variant(folder: Path, variant: str | None) -> list[Path]:
    """The files of a variant, such as `model.fp16.safetensors`; those without variant where it has none."""
    every = sorted(folder.glob("*.safetensors"))
    wanted = [file for file in every if variant is not None and f".{variant}" in file.name]
    files = wanted or [file for file in every if file.name.count(".") == 1]
    if not files:
        raise ModelLoadError(f"{folder} has no safetensors file for the variant {variant!r}.")
    return files
