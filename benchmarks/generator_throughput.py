"""How long does one image take, and how much faster is a batch?

    .venv/bin/python -m benchmarks.generator_throughput --threads 2

Generates with the configured generator as a worker does, with its defaults and several references per image. Every
round uses each batch size once, so that a busy machine slows all of them alike. Prints the times, the processor time of
all threads together, which depends less on other work on the machine, and the peak memory.
"""

import argparse
import resource
import statistics
import time
from collections import defaultdict

import numpy as np
import torch
from PIL import Image

from benchmarks.conditions import report
from shared.capabilities import drawable_size, resolve_mode
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
    parser.add_argument(
        "--references", type=int, default=3, help="per image, up to the model's most (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = get_settings()
    clip = Clip.load(settings.model)  # a worker also has one, beside its generator
    model = Diffusion.load(settings.model.default_generator, settings.model)
    model.warm_up()
    count = min(arguments.references, model.capabilities.max_references)
    references = random_references(clip, count)
    seconds: dict[int, list[float]] = defaultdict(list)
    processor_seconds: dict[int, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for size in BATCHES:
            requests = [request(model, references, seed) for seed in range(size)]
            started, used = time.perf_counter(), time.process_time()
            model.generate(requests, lambda _step, _steps: True)
            seconds[size].append((time.perf_counter() - started) / size)
            processor_seconds[size].append((time.process_time() - used) / size)
    alone = statistics.median(seconds[1])
    curve: dict[str, object] = {
        f"batch of {size}": f"{statistics.median(times):.3f} s an image, "
        f"{statistics.median(one / each for one, each in zip(seconds[1], times, strict=True)):.2f}x the throughput, "
        f"{statistics.median(processor_seconds[size]):.3f} s of processor time"
        for size, times in seconds.items()
    }
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"one image": f"{alone:.2f} s", **curve, "peak memory": f"{peak_mib:.0f} MiB"}
    defaults = model.defaults
    drawn = f"{defaults.width} x {defaults.height}, {defaults.num_inference_steps} steps"
    threads = torch.get_num_threads()
    report("Images per second", figures, model=model.name, drawn=drawn, references=count, threads=threads)


def random_references(clip: Clip, count: int) -> list[Reference]:
    """Return references to one thing with random pixels. Their weights differ, as those of a search do."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)) for _ in range(count)]
    vectors = clip.encode_image(images)
    return [
        Reference(vector=vector, image=image, weight=1 / place, caption="a thing", concepts=("a thing to draw",))
        for place, (vector, image) in enumerate(zip(vectors, images, strict=True), start=1)
    ]


def request(model: Diffusion, references: list[Reference], seed: int) -> ImageRequest:
    """Return a request with all defaults and these references."""
    defaults = model.defaults
    width, height = drawable_size(model.capabilities, defaults.width, defaults.height)
    mode, _ = resolve_mode(model.capabilities, Mode.AUTO, references=len(references), captions=len(references))
    return ImageRequest.of(
        defaults,
        prompt="a thing to draw",
        seed=seed,
        width=width,
        height=height,
        mode=mode,
        references=references,
    )


if __name__ == "__main__":
    main()
