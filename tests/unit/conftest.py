"""Small models for unit tests: saved once per session, and loaded once by the product's own code."""

from __future__ import annotations  # worker_service is imported only by the tests that need torch

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shared.settings import ClipSettings, GeneratorSettings, IPAdapterSettings, LoraSettings, ModelSettings

if TYPE_CHECKING:
    from worker_service.models.generation.diffusion import Diffusion


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clip`, `sd15`, `sdxl`, `sdxl_turbo` and `flux`."""
    from tests import small_pipelines

    folder = tmp_path_factory.mktemp("models")
    small_pipelines.save_clip(folder / "clip")
    small_pipelines.save_sd15(folder / "sd15")
    small_pipelines.save_sdxl(folder / "sdxl")
    small_pipelines.save_sdxl(folder / "sdxl_turbo", turbo=True)
    small_pipelines.save_flux(folder / "flux")
    return folder


@pytest.fixture(scope="session")
def model_settings(small_models: Path) -> ModelSettings:
    """Every small pipeline, configured as an operator configures the full-size model."""
    sdxl = str(small_models / "sdxl")
    sd15 = str(small_models / "sd15")

    def sdxl_adapter(weight_name: str) -> IPAdapterSettings:
        return IPAdapterSettings(
            source=sdxl,
            subfolder="sdxl_models",
            weight_name=weight_name,
            image_encoder_folder="models/image_encoder",
            conditions_on="image",
        )

    return ModelSettings(
        clip=ClipSettings(model=f"local-dir:{small_models / 'clip'}", max_batch_size=3),
        generators={
            "sd15": GeneratorSettings(
                source=sd15, ip_adapter=IPAdapterSettings(source=sd15, conditions_on="embedding_space")
            ),
            "sd15_plain": GeneratorSettings(source=sd15),
            "sd15_lora": GeneratorSettings(
                source=sd15,
                ip_adapter=IPAdapterSettings(source=sd15, conditions_on="embedding_space"),
                loras={
                    name: LoraSettings(source=f"{sd15}/lora", weight_name=f"{name}.safetensors")
                    for name in ("ink", "neon")
                },
            ),
            "sdxl": GeneratorSettings(source=sdxl, ip_adapter=sdxl_adapter("ip-adapter_sdxl_vit-h.safetensors")),
            "sdxl_plus": GeneratorSettings(
                source=sdxl, ip_adapter=sdxl_adapter("ip-adapter-plus_sdxl_vit-h.safetensors")
            ),
            "sdxl_turbo": GeneratorSettings(source=str(small_models / "sdxl_turbo")),
            "flux": GeneratorSettings(source=str(small_models / "flux")),
        },
        default_generator="sd15",
        threads=1,
    )


@pytest.fixture(scope="session")
def loaded(model_settings: ModelSettings) -> Callable[[str], Diffusion]:
    """`loaded("sd15")` gives that generator of `model_settings`. Its first call loads it."""
    from worker_service.models.generation.diffusion import Diffusion

    return cache(lambda name: Diffusion.load(name, model_settings))


@pytest.fixture(scope="module")
def small_references() -> Iterator[None]:
    """Pipelines that enlarge every reference to a megapixel make it 64 pixels wide. A megapixel takes a CPU seconds."""
    from diffusers.pipelines.joyimage import image_processor
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    side = 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", side * side)
        patch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", side * side)
        patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (side, side, None))
        patch.setitem(image_processor.BUCKETS, 1024, [(side, side), (side, 2 * side)])
        yield
