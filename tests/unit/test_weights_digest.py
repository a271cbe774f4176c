"""Digest of a generator's weights: which files count, how often they are read, and what it costs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from shared.settings import GeneratorSettings, IPAdapterSettings
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.pipelines import weights_digest
from worker_service.models.pipelines.weights_digest import file_digest

Loaded = Callable[[str], Diffusion]


def digest(pipeline: Any, source: Path | str, **settings: Any) -> str:
    generator = GeneratorSettings(source=str(source), **settings)
    return weights_digest.of_pipeline(pipeline, generator)


def test_the_digest_depends_on_the_weights_but_not_on_their_place_or_dtype(
    loaded: Loaded, small_models: Path, tmp_path: Path
) -> None:
    model = loaded("sd15_plain")
    assert model.capabilities.weights_digest_kind == "files"
    pipeline = model.text_to_image
    shutil.copytree(small_models / "sd15", tmp_path / "copy")
    assert digest(pipeline, tmp_path / "copy", dtype="bfloat16") == model.capabilities.weights_digest
    adapter = IPAdapterSettings(source=str(tmp_path / "copy"), conditions_on="embedding_space")
    with_adapter = digest(pipeline, tmp_path / "copy", ip_adapter=adapter)
    assert with_adapter != model.capabilities.weights_digest
    for weights in ("vae/diffusion_pytorch_model.safetensors", adapter.subfolder + "/" + adapter.weight_name):
        file = tmp_path / "copy" / weights
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        assert digest(pipeline, tmp_path / "copy", ip_adapter=adapter) != with_adapter


def test_only_the_files_of_the_variant_count(loaded: Loaded, small_models: Path, tmp_path: Path) -> None:
    pipeline = loaded("sd15_plain").text_to_image
    shutil.copytree(small_models / "sd15", tmp_path / "sd15")
    plain = digest(pipeline, tmp_path / "sd15")
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        (tmp_path / "sd15" / f"{part}.fp16.safetensors").write_bytes(b"half")
    assert digest(pipeline, tmp_path / "sd15") == plain
    half = digest(pipeline, tmp_path / "sd15", variant="fp16")
    assert half != plain
    (tmp_path / "sd15/unet/diffusion_pytorch_model.safetensors").unlink()
    assert digest(pipeline, tmp_path / "sd15", variant="fp16") == half


def test_a_model_in_the_hubs_cache_has_the_digest_of_the_same_folder(
    loaded: Loaded, small_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("sd15_plain")
    commit = "a" * 40
    shutil.copytree(small_models / "sd15", tmp_path / "models--someone--sd15" / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert digest(model.text_to_image, "someone/sd15", revision=commit) == model.capabilities.weights_digest


def test_a_large_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    cache, file = tmp_path / "cache", tmp_path / "model.safetensors"
    file.write_bytes(b"first")
    times = file.stat().st_mtime_ns
    first = file_digest(file, cache=cache, cached_bytes=1)
    file.write_bytes(b"other")
    os.utime(file, ns=(times, times))
    assert file_digest(file, cache=cache, cached_bytes=1) == first, "it was read again"
    os.utime(file, ns=(times, times + 1))
    assert file_digest(file, cache=cache, cached_bytes=1) == file_digest(file) != first


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    assert file_digest(file, cache=no_folder, cached_bytes=1) == file_digest(file)
