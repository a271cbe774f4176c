"""How long does one image take, and how much faster is a batch?

    .venv/bin/python -m benchmarks.generator_throughput --threads 2

Generates with the configured generator as a worker does, with its defaults and four references per image. Every round
uses each batch size once, so that a busy machine slows all of them alike. Prints the times and the peak memory.
"""

import argparse
import resource
import statistics
import time
from collections import defaultdict

import numpy as np
import torch

from benchmarks.conditions import report
from shared.capabilities import drawable_size
from shared.contracts.generation import Mode
from shared.settings import get_settings
from worker_service.models.clip import Clip
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.interface import ImageRequest, Reference

BATCHES = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="each batch size once per round (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = get_settings()
    clip = Clip.load(settings.model)  # a worker also has one, beside its generator
    model = Diffusion.load(settings.model.default_generator, settings.model)
    model.warm_up()
    vectors = clip.encode_text([f"thing {number}" for number in range(model.capabilities.max_references)])
    seconds: dict[int, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for size in BATCHES:
            requests = [request(model, vectors, seed) for seed in range(size)]
            started = time.perf_counter()
            model.generate(requests, lambda _step, _steps: True)
            seconds[size].append((time.perf_counter() - started) / size)
    alone = statistics.median(seconds[1])
    curve: dict[str, object] = {
        f"batch of {size}": f"{statistics.median(times):.3f} s an image, "
        f"{statistics.median(one / each for one, each in zip(seconds[1], times, strict=True)):.2f}x the throughput"
        for size, times in seconds.items()
    }
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"one image": f"{alone:.2f} s", **curve, "peak memory": f"{peak_mib:.0f} MiB"}
    defaults = model.defaults
    drawn = f"{defaults.width} x {defaults.height}, {defaults.num_inference_steps} steps"
    report("Images per second", figures, model=model.name, drawn=drawn, threads=torch.get_num_threads())


def request(model: Diffusion, vectors: np.ndarray, seed: int) -> ImageRequest:
    """Return a request with all defaults and one reference per vector. vectors: shape (n, dim), float32."""
    defaults = model.defaults
    width, height = drawable_size(model.capabilities, defaults.width, defaults.height)
    return ImageRequest.of(
        defaults,
        prompt="a thing to draw",
        seed=seed,
        width=width,
        height=height,
        mode=Mode.IMAGE_PROMPT,
        references=[Reference(vector=vector, image=None, weight=1 / len(vectors), caption=None) for vector in vectors],
    )


if __name__ == "__main__":
    main()
