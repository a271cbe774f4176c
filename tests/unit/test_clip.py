"""The retrieval model `Clip`, on a small open_clip folder that the product's own code loads."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from shared.errors import EmbeddingError, ModelLoadError
from shared.settings import ClipSettings, ModelSettings
from tests import small_pipelines
from worker_service.models.clip import Clip
from worker_service.models.generation.framing import MAX_ASPECT


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-4) -> bool:
    """Whether vectors agree. Batches of different sizes run different kernels: float32 results agree to about 1e-6."""
    return np.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def clip(model_settings: ModelSettings) -> Clip:
    return Clip.load(model_settings)


def settings_for(model: str, *, pretrained: str | None = None, dtype: str = "float32") -> ModelSettings:
    return ModelSettings(clip=ClipSettings.model_validate({"model": model, "pretrained": pretrained, "dtype": dtype}))


def picture(seed: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_vectors_are_float32_projections_that_are_not_normalised(clip: Clip) -> None:
    texts, images = clip.encode_text(["a cat", "a dog"]), clip.encode_image([picture(1)])
    assert texts.dtype == images.dtype == np.float32
    assert texts.shape == (2, clip.dim)
    assert images.shape == (1, clip.dim)
    lengths = np.linalg.norm(np.concatenate([texts, images]), axis=1)
    assert (np.abs(lengths - 1) > 0.1).all()


def test_a_vector_does_not_depend_on_its_batch(clip: Clip) -> None:
    texts = [f"picture number {i}" for i in range(2 * clip.max_batch_size + 1)]
    images = [picture(i) for i in range(2 * clip.max_batch_size + 1)]
    assert close(clip.encode_text(texts), np.concatenate([clip.encode_text([text]) for text in texts]))
    assert close(clip.encode_image(images), np.concatenate([clip.encode_image([image]) for image in images]))


def test_different_texts_and_images_have_different_vectors(clip: Clip) -> None:
    assert not close(*clip.encode_text(["a cat", "a dog"]))
    assert not close(*clip.encode_image([picture(1), picture(2)]))


def test_an_empty_list_gives_no_vectors(clip: Clip) -> None:
    assert clip.encode_text([]).shape == clip.encode_image([]).shape == (0, clip.dim)


def test_a_text_longer_than_the_context_has_the_mean_vector_of_its_parts(clip: Clip) -> None:
    first, second = "a red apple on a", "blue dining table"  # a token for each letter, and 22 fit
    assert clip.parts_of_text(f"{first} {second}") == [first, second]
    both, one, other = clip.encode_text([f"{first} {second}", first, second])
    assert close(both, np.average([one, other], axis=0, weights=[len(first), len(second)]))
    assert not close(both, one)
    assert clip.parts_of_text("a" * 22) == ["a" * 22]


@pytest.mark.parametrize(
    "text", ["ab" * 500, "a b " * 300, "a" * 100 + "   " + "b" * 100, "\N{BLACK CHESS KING}" * 2000, "", " "]
)
def test_no_part_of_a_text_is_cut_off_or_lost(clip: Clip, text: str) -> None:
    parts = clip.parts_of_text(text)
    assert "".join(parts).replace(" ", "") == text.replace(" ", "")
    for part in parts:
        assert len(clip.tokenizer.tokenizer(part).input_ids) <= clip.tokenizer.context_length
    assert clip.encode_text([text]).shape == (1, clip.dim)


def test_the_usual_tokenizer_divides_texts_too(clip: Clip) -> None:
    usual = replace(clip, tokenizer=open_clip.tokenizer.SimpleTokenizer())
    assert usual.parts_of_text("a word " * 30) == ["a word " * 29 + "a word "]
    parts = usual.parts_of_text(" ".join(["a word"] * 40))
    assert len(parts) == 2
    assert " ".join(parts) == " ".join(["a word"] * 40)


def test_a_tokenizer_with_a_token_behind_the_padding_cuts_long_texts(clip: Clip) -> None:
    @dataclass
    class ClassTokenLast:
        context_length: int = 24

        def __call__(self, texts: list[str], context_length: int = 24) -> torch.Tensor:
            tokens: torch.Tensor = clip.tokenizer(texts, context_length)
            tokens[:, -1] = 7
            return tokens

    assert replace(clip, tokenizer=ClassTokenLast()).parts_of_text("a word " * 30) == ["a word " * 30]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_images_of_every_mode_are_encoded_as_their_colours(clip: Clip, mode: str) -> None:
    image = picture(3).convert(mode)
    assert close(clip.encode_image([image]), clip.encode_image([image.convert("RGB")]))


def test_the_space_is_the_same_in_every_process(clip: Clip, model_settings: ModelSettings) -> None:
    program = (
        "import sys; from shared.settings import ModelSettings; from worker_service.models.clip import Clip;"
        "print(Clip.load(ModelSettings.model_validate_json(sys.argv[1])).space_digest)"
    )
    other_process = subprocess.run(
        [sys.executable, "-c", program, model_settings.model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert other_process.stdout.split()[-1] == clip.space_digest


def test_the_space_depends_neither_on_the_folders_path_nor_on_the_dtype(
    clip: Clip, small_models: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_models / "clip", tmp_path / "moved")
    moved = Clip.load(settings_for(f"local-dir:{tmp_path / 'moved'}", dtype="bfloat16"))
    assert moved.space_digest == clip.space_digest
    assert moved.dtype is torch.bfloat16
    assert moved.encode_text(["a cat"]).dtype == np.float32
    assert close(moved.encode_text(["a cat"]), clip.encode_text(["a cat"]), tolerance=0.1)


def test_different_weights_or_preprocessing_make_different_spaces(clip: Clip, tmp_path: Path) -> None:
    small_pipelines.save_clip(tmp_path / "other_weights", seed=1)
    other_weights = Clip.load(settings_for(f"local-dir:{tmp_path / 'other_weights'}"))
    assert other_weights.space_digest != clip.space_digest

    small_pipelines.save_clip(tmp_path / "other_mean")
    config = tmp_path / "other_mean" / "open_clip_config.json"
    config.write_text(config.read_text().replace('"mean": [0.5,', '"mean": [0.4,'))
    other_mean = Clip.load(settings_for(f"local-dir:{tmp_path / 'other_mean'}"))
    assert other_mean.weights_digest == clip.weights_digest
    assert other_mean.space_digest != clip.space_digest


def test_an_open_clip_name_loads_with_weights_from_a_file(tmp_path: Path) -> None:
    towers = {"vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}}
    towers |= {"text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}
    (tmp_path / "tiny-of-this-test.json").write_text(json.dumps({"embed_dim": 8, **towers}))
    open_clip.add_model_config(tmp_path)
    torch.save(open_clip.create_model("tiny-of-this-test").state_dict(), tmp_path / "weights.pt")

    clip = Clip.load(settings_for("tiny-of-this-test", pretrained=str(tmp_path / "weights.pt")))

    assert clip.dim == clip.encode_image([picture(1)]).shape[1] == 8
    assert clip.name == f"tiny-of-this-test/{tmp_path / 'weights.pt'}"


def test_a_vector_that_is_not_finite_or_has_length_0_is_an_error(model_settings: ModelSettings) -> None:
    broken = Clip.load(model_settings)
    with torch.no_grad():
        broken.model.text_projection.fill_(float("nan"))
    with pytest.raises(EmbeddingError, match="not finite numbers"):
        broken.encode_text(["a cat"])
    with torch.no_grad():
        broken.model.text_projection.fill_(0)
    with pytest.raises(EmbeddingError, match="length 0"):
        broken.encode_text(["a cat"])


@pytest.mark.parametrize(
    ("model", "pretrained", "cause"),
    [
        ("local-dir:/nowhere/clip", None, "/nowhere/clip"),
        ("ViT-B-32", None, "ViT-B-32.*pretrained"),
        ("ViT-B-32", "no-such-tag", "no-such-tag"),
        ("no-such-model", "openai", "no-such-model"),
        ("hf-hub:nobody/no-such-clip", None, "nobody/no-such-clip"),
    ],
)
def test_a_load_error_names_the_model_and_the_cause(model: str, pretrained: str | None, cause: str) -> None:
    with pytest.raises(ModelLoadError, match=cause):
        Clip.load(settings_for(model, pretrained=pretrained))


def test_a_model_without_weights_is_not_loaded_with_random_ones(small_models: Path, tmp_path: Path) -> None:
    shutil.copytree(small_models / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelLoadError):
        Clip.load(settings_for(f"local-dir:{tmp_path / 'clip'}"))


@pytest.mark.parametrize("size", [(2000, 8), (8, 2000), (5000, 1)])
def test_only_the_middle_of_a_very_long_image_is_encoded(clip: Clip, size: tuple[int, int]) -> None:
    strip = Image.linear_gradient("L").resize(size).convert("RGB")
    width, height = size
    longest = min(size) * MAX_ASPECT
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    middle = strip.crop((left, top, left + min(width, longest), top + min(height, longest)))
    assert close(clip.encode_image([strip]), clip.encode_image([middle]))
