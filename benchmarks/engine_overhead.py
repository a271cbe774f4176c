"""How much slower is an engine behind a worker than the engine alone?

    .venv/bin/python -m benchmarks.engine_overhead --images 60

The engine is a server that draws one image of 1024 x 1024 pixels at a time, in a fixed time, as a GPU does. Its own
clock measures from the first image to the last. It draws for a client that keeps two images in flight, and then for
jobs of the whole service, each with one image. The answers are PNG files of about 2 MB. Run it on a machine that is
free. At a load average of 27 and more, the worker did not get the processor time that it needs.
"""

import argparse
import base64
import json
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.conditions import report, save
from tests.fake_engine import Answer, Drawing, FakeEngine, png
from tests.stack import RunningStack, running_stack

SIDE = 1024
IN_FLIGHT = 2
POLL_S = 30


class BusyEngine(FakeEngine):
    """Draws one image at a time, and keeps when it began and ended each."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds=seconds)
        coarse = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.int16)
        noise = np.random.default_rng(1).integers(-4, 5, smooth.shape)
        picture = base64.b64encode(png((smooth + noise).clip(1, 255).astype(np.uint8))).decode()
        self.body = json.dumps({"created": 0, "data": [{"b64_json": picture}]})
        self.answer = self.draw_alone
        self.times: list[tuple[float, float]] = []
        self._accelerator = threading.Lock()

    def draw_alone(self, _drawing: Drawing) -> Answer:
        with self._accelerator:
            began = time.perf_counter()
            time.sleep(self.seconds)
            self.times.append((began, time.perf_counter()))
        return self.body, 200, {"Content-Type": "application/json"}

    def seconds_per_image(self) -> float:
        """From the beginning of the first image to the end of the last, since the last call of this method."""
        times, self.times = sorted(self.times), []
        return (times[-1][1] - times[0][0]) / len(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60, help="images of each measurement (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of one image (default: %(default)s)")
    arguments = parser.parse_args()
    with BusyEngine(arguments.seconds).serving() as engine, tempfile.TemporaryDirectory() as folder:
        assert isinstance(engine, BusyEngine)
        draw_alone(engine, arguments.images)
        alone = engine.seconds_per_image()
        with running_stack(Path(folder), environment=environment(engine), options=("--embed", "0")) as stack:
            run_jobs(stack, IN_FLIGHT)  # warm
            engine.seconds_per_image()
            took = run_jobs(stack, arguments.images)
            behind_the_worker = engine.seconds_per_image()
        draw_alone(engine, arguments.images)
        again = engine.seconds_per_image()
    figures: dict[str, object] = {
        "engine alone": f"{alone:.4f} s an image, and {again:.4f} s afterwards",
        "behind a worker": f"{behind_the_worker:.4f} s an image",
        "overhead": f"{behind_the_worker / min(alone, again) - 1:.1%}",
        "from the first submit to the last result": f"{took:.1f} s for {arguments.images} jobs of one image",
    }
    settings = {"images": arguments.images, "seconds of one image": arguments.seconds, "in flight": IN_FLIGHT}
    report("Overhead of the service over an engine", figures, **settings)
    save("engine-overhead", figures, **settings)


def draw_alone(engine: FakeEngine, images: int) -> None:
    with httpx.Client(timeout=60) as http, ThreadPoolExecutor(IN_FLIGHT) as threads:
        body = {"model": "busy", "prompt": "a cat", "size": f"{SIDE}x{SIDE}", "response_format": "b64_json"}
        for answer in threads.map(lambda _: http.post(f"{engine.url}/images/generations", json=body), range(images)):
            answer.raise_for_status()


def environment(engine: FakeEngine) -> dict[str, str]:
    remote = {
        "kind": "openai",
        "engine": {"urls": [engine.url], "model": "busy", "modes": ["none"], "concurrency": IN_FLIGHT},
        "native_side": SIDE,
        "defaults": {"num_inference_steps": 4, "guidance_scale": 1.0},
    }
    return {
        "AFTERIMAGE_ENVIRONMENT": "test",
        "AFTERIMAGE_MODEL__GENERATORS": json.dumps({"remote": remote}),
        "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "remote",
    }


def run_jobs(stack: RunningStack, count: int) -> float:
    """Submit jobs of one image each, and wait for their ends. Returns the seconds."""
    started = time.perf_counter()
    with httpx.Client(base_url=f"{stack.url}/api/v1", timeout=POLL_S + 30) as http:
        accepted = [
            http.post("/generate", json={"prompt": f"a cat {number}", "seed": number}).raise_for_status().json()
            for number in range(count)
        ]
        for job in accepted:
            ended = wait_for(http, job["id"])
            assert ended["state"] == "succeeded", ended
    return time.perf_counter() - started


def wait_for(http: httpx.Client, job_id: str) -> dict[str, Any]:
    while True:
        job: dict[str, Any] = http.get(f"/jobs/{job_id}", params={"wait": POLL_S}).raise_for_status().json()
        if job["finished_at"] is not None:
            return job


if __name__ == "__main__":
    main()
