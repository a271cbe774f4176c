"""Equal prompts of a batch are encoded once, by pipelines whose encoders return all kinds of shapes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.test_diffusion_batches import ROUNDING
from tests.unit.test_todays_pipelines import CASES, draw, load, request_for
from worker_service.models.generation.diffusion import Diffusion

LoadModel = Callable[[str], Diffusion]
STABLE_DIFFUSION = ["sd15", "sdxl"]
OTHERS = ["FLUX.1 dev", "FLUX.2 klein Base", "Qwen-Image", "Krea 2", "SD3", "Sana", "Z-Image", "Chroma", "Lumina 2"]
"""One of each shape of embeddings. Joy is not among them: it encodes prompts by another method, with the images."""


@pytest.fixture
def model(request: pytest.FixtureRequest, loaded: LoadModel, tmp_path: Path) -> Diffusion:
    name = request.param
    if name in STABLE_DIFFUSION:
        return loaded(name)
    CASES[name].save(tmp_path)
    return load(tmp_path, CASES[name].settings(tmp_path))


@contextmanager
def rows_of_encoders(model: Diffusion) -> Iterator[list[int]]:
    """The number of texts in each call of a text encoder inside the block."""
    rows: list[int] = []

    def record(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], options: dict[str, torch.Tensor]) -> None:
        rows.append(len(arguments[0] if arguments else options["input_ids"]))

    encoders = [part for name, part in model.text_to_image.components.items() if name.startswith("text_encoder")]
    hooks = [encoder.register_forward_pre_hook(record, with_kwargs=True) for encoder in encoders if encoder is not None]
    hooks += [
        encoder.model.register_forward_pre_hook(record, with_kwargs=True)
        for encoder in encoders
        if hasattr(encoder, "model")
    ]
    yield rows
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("model", [*STABLE_DIFFUSION, *OTHERS], indirect=True)
def test_each_different_prompt_of_a_batch_is_encoded_once(model: Diffusion) -> None:
    first = request_for(model, seed=1)
    other = replace(first, prompt="two red zebras")
    if model.capabilities.supports_negative_prompt:
        first, other = replace(first, negative_prompt="fog"), replace(other, negative_prompt="rain and fog")
    for requests in ([first, replace(first, seed=2), replace(first, seed=3)], [other, first, replace(other, seed=4)]):
        if model.batch_key(requests[0]) != model.batch_key(requests[1]):
            continue
        with rows_of_encoders(model) as rows:
            together = draw(model, *requests)
        assert rows
        assert max(rows) <= len({request.prompt for request in requests})
        alone = np.concatenate([draw(model, request) for request in requests])
        assert np.abs(together - alone).max() <= ROUNDING / 255
