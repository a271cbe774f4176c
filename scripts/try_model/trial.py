"""The generator that is tried: loaded as a worker loads it, with pictures as references and requests for its images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from scripts.index_images.sources import Sample, read_samples
from shared.capabilities import drawable_size, supports
from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities
from shared.errors import ConfigurationError
from shared.imaging import open_image
from shared.settings import GeneratorSettings, Settings
from worker_service.execution.steps import OnStep, go_on
from worker_service.models.clip import Clip
from worker_service.models.engines.generator import OpenAIGenerator
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.interface import ImageModel, ImageRequest, Reference
from worker_service.models.worker_models import GENERATORS, require_fitting_clip

SAMPLES_READ = 5000
"""Pictures of a source among which the references are chosen."""


@dataclass(frozen=True)
class Options:
    name: str
    """Of the generator in the settings."""
    prompt: str
    references: Path
    """Folder or WebDataset tar of pictures."""
    size: tuple[int, int] | None
    """(width, height) in pixels; None: the model's default."""
    steps: int | None
    repeats: int
    """Timed calls per measurement."""
    against: tuple[str, ...] = ()
    """Other generators of the settings, to compare with."""
    checks_promises: bool = True
    """False: only the measurements, which take a fraction of the time."""


@dataclass(frozen=True)
class Trial:
    """A loaded and warm generator, and what its images are drawn from."""

    model: ImageModel
    settings: GeneratorSettings
    prompt: str
    references: tuple[Reference, ...]
    """As many as the model takes, with weight 1, unless the source has fewer."""
    width: int
    """Pixels of the images, with `height`."""
    height: int
    steps: int
    load_s: float
    warm_up_s: float

    @classmethod
    def load(cls, options: Options, settings: Settings, *, warm_up: bool = True) -> Self:
        """Load and warm up the generator with the worker's code. Neither database nor broker is needed.

        warm_up: False leaves out the first images, and with them the probe.

        Raises:
            ModelNotFoundError: the settings have no generator of that name.
            ModelLoadError: the generator, or the CLIP that its adapter needs, cannot be loaded.
            ConfigurationError: the model reads references, and their source has none.
            SourceError: the source of the references cannot be read.
        """
        generator = settings.model.generator(options.name)
        started = time.perf_counter()
        model: ImageModel = GENERATORS[generator.kind].load(options.name, settings.model)
        loaded = time.perf_counter()
        if warm_up:
            model.warm_up()
        warm = time.perf_counter()
        capabilities = model.capabilities
        clip = None
        if model.reference_dim is not None:
            clip = Clip.load(settings.model)
            require_fitting_clip(model, clip_name=clip.name, dim=clip.dim)
        samples: Sequence[Sample] = []
        if set(capabilities.modes) - {Mode.NONE.value}:
            samples = choose_samples(options.references, options.prompt, capabilities.max_references)
            if not samples:
                raise ConfigurationError(f"{options.references} has no pictures to use as references.")
        size = options.size or (model.defaults.width, model.defaults.height)
        width, height = drawable_size(capabilities, *size)
        return cls(
            model=model,
            settings=generator,
            prompt=options.prompt,
            references=tuple(_reference(sample, clip) for sample in samples),
            width=width,
            height=height,
            steps=options.steps or model.defaults.num_inference_steps,
            load_s=loaded - started,
            warm_up_s=warm - loaded,
        )

    @property
    def capabilities(self) -> Capabilities:
        return self.model.capabilities

    @property
    def device(self) -> torch.device:
        """Device of this process; that of an engine elsewhere is not known."""
        return torch.device("cpu" if isinstance(self.model, OpenAIGenerator) else self.capabilities.device)

    @property
    def modes(self) -> list[Mode]:
        """The modes that the model offers."""
        return [Mode(name) for name in self.capabilities.modes]

    @property
    def plain_mode(self) -> Mode:
        """The mode that needs the fewest references."""
        return Mode.REFERENCE if self.capabilities.needs_reference else Mode.NONE

    @property
    def weighing_mode(self) -> Mode | None:
        """The mode in which `auto` reads the pictures of references, several of them and by weight."""
        return next((each for each in (Mode.IMAGE_PROMPT, Mode.REFERENCE) if supports(self.capabilities, each)), None)

    def request(self, mode: Mode, *, references: int = 0, seed: int = 0, **changes: Any) -> ImageRequest:
        """A request for one image, with the first `references` references. changes: other fields of the request."""
        if mode is Mode.REFERENCE and self.capabilities.needs_reference:
            references = max(1, references)
        request = ImageRequest.of(
            self.model.defaults,
            prompt=self.prompt,
            seed=seed,
            width=self.width,
            height=self.height,
            mode=mode,
            references=self.references[:references],
        )
        return replace(request, **{"num_inference_steps": self.steps} | changes)

    def draw(self, *requests: ImageRequest, on_step: OnStep = go_on) -> np.ndarray:
        """The images of one call before rounding, where the model shows them.

        Shape (n, height, width, 3), floats in [0, 1].

        Raises: as `ImageModel.generate`.
        """
        if isinstance(self.model, Diffusion):
            return self.model.draw(requests, on_step)
        return np.stack(self.model.generate(requests, on_step)).astype(np.float32) / 255


def choose_samples(source: Path, prompt: str, count: int) -> list[Sample]:
    """Pictures of different things, those first whose descriptions share most words with the prompt.

    Raises:
        SourceError: the source cannot be read.
    """
    words = {word for word in prompt.lower().split() if len(word) > 2}
    by_caption: dict[str, Sample] = {}
    for _, sample in zip(range(SAMPLES_READ), read_samples(source), strict=False):
        by_caption.setdefault(_caption(sample), sample)
    ranked = sorted(by_caption, key=lambda caption: -len(words & set(caption.lower().split())))
    return [by_caption[caption] for caption in ranked[:count]]


def _caption(sample: Sample) -> str:
    return str(sample.fields.get("caption") or PurePath(sample.filename).stem.replace("_", " "))


def _reference(sample: Sample, clip: Clip | None) -> Reference:
    image: Image.Image = open_image(sample.data)
    vector = None if clip is None else clip.encode_image([image])[0]
    return Reference(vector=vector, image=image, weight=1.0, caption=_caption(sample), sha256=sample.sha256)
