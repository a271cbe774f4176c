"""An image for generators to draw: without references, guidance as most models take it."""

from shared.contracts.generation import Mode
from worker_service.models.interface import ImageRequest

IMAGE_REQUEST = ImageRequest(
    prompt="a red apple",
    negative_prompt=None,
    seed=7,
    width=64,
    height=64,
    num_inference_steps=4,
    guidance_scale=3.0,
    scheduler=None,
    loras=(),
    mode=Mode.NONE,
    ip_adapter_scale=0.8,
    strength=0.7,
    references=(),
)
