"""The starter model behind OpenAI's image calls, as a server on loopback: `python -m tests.pipeline_engine PORT`."""

import io
import sys
import threading

import numpy as np
from PIL import Image

from shared.contracts.generation import Mode
from shared.settings import ModelSettings
from tests.fake_engine import Drawing, FakeEngine
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.interface import ImageRequest, Reference


class PipelineEngine(FakeEngine):
    """Draws with a pipeline of diffusers, one image at a time."""

    def __init__(self, model: Diffusion) -> None:
        super().__init__()
        self.model = model
        self.paint = self.draw_with_pipeline
        self._one_at_a_time = threading.Lock()

    def draw_with_pipeline(self, drawing: Drawing) -> np.ndarray:
        fields = drawing.fields
        width, height = drawing.size
        pictures = [Image.open(io.BytesIO(picture)) for picture in drawing.pictures]
        request = ImageRequest.of(
            self.model.defaults.model_copy(
                update={
                    "num_inference_steps": int(fields["num_inference_steps"]),
                    "guidance_scale": float(fields["guidance_scale"]),
                }
            ),
            prompt=fields["prompt"],
            seed=int(fields["seed"]),
            width=width,
            height=height,
            mode=Mode.REFERENCE if pictures else Mode.NONE,
            references=[Reference(None, picture, weight=1, caption=None) for picture in pictures],
        )
        with self._one_at_a_time:
            (image,) = self.model.generate([request], lambda *_: True)
        return image


if __name__ == "__main__":
    with PipelineEngine(Diffusion.load("starter", ModelSettings())).serving(int(sys.argv[1])):
        threading.Event().wait()
