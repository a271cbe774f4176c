"""Requests of every kind to the API, in turn, spread over a run."""

import io
import threading
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from itertools import cycle
from typing import Any, Self

import httpx
from PIL import Image

CLIENTS = 4
PATIENCE = 20
"""How often a client retries after a 503: a busy machine may take long to decode an upload."""
PROMPTS = ("a red apple", "a green pear", "a blue cup", "a yellow taxi", "a small dog", "a wooden chair")


class Requests:
    """Clients that send `total` requests over a run, in step with `done`, the share of finished work in [0, 1].

    `statuses` counts the answers by status. `failures` lists the requests that failed.
    """

    def __init__(self, url: str, bulk_id: str, *, total: int, done: Callable[[], float]) -> None:
        self._url, self._bulk_id, self._total, self._done = url, bulk_id, total, done
        self._made = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        self.statuses: Counter[int] = Counter()
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.wait()

    def wait(self) -> None:
        """Wait until all clients have ended."""
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        with httpx.Client(base_url=f"{self._url}/api/v1", timeout=60) as http:
            kinds = cycle(
                [self._read, self._search, self._read, self._generate, self._read, self._stream, self._upload]
            )
            for turn, kind in enumerate(kinds):
                mine = self._next()
                if mine is None:
                    return
                while mine > self._done() * self._total:
                    if self._over.wait(0.05):
                        return
                try:
                    answer = kind(http, turn * CLIENTS + number)
                    for _ in range(PATIENCE):
                        if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE or self._over.wait(1):
                            break
                        self.statuses[answer.status_code] += 1
                        answer = kind(http, turn * CLIENTS + number)
                    self._count(answer)
                except httpx.HTTPError as error:
                    self.failures.append(f"{kind.__name__}: {error!r}")

    def _next(self) -> int | None:
        with self._lock:
            if self._made == self._total:
                return None
            self._made += 1
            return self._made

    def _count(self, answer: httpx.Response) -> None:
        with self._lock:
            self.statuses[answer.status_code] += 1
            if not answer.is_success:
                self.failures.append(f"{answer.request.method} {answer.request.url.path}: {answer.status_code}")

    def _read(self, http: httpx.Client, turn: int) -> httpx.Response:
        routes = ["/health", "/jobs", "/stats", "/images", f"/bulks/{self._bulk_id}", "/generations", "/models"]
        return http.get(routes[turn % len(routes)])

    def _search(self, http: httpx.Client, turn: int) -> httpx.Response:
        return http.post("/search", json={"query": f"{PROMPTS[turn % len(PROMPTS)]} {turn % 50}", "k": 5})

    def _generate(self, http: httpx.Client, turn: int) -> httpx.Response:
        """Submit an interactive job, which runs before the bulk. Wait for it and download its image."""
        answer = http.post("/generate", json={"prompt": f"now {turn}"}, headers={"Prefer": "wait=20"})
        outputs: list[dict[str, Any]] = answer.json().get("outputs", [])
        return httpx.get(self._url + outputs[0]["content_url"], timeout=60) if outputs else answer

    def _stream(self, http: httpx.Client, turn: int) -> httpx.Response:
        job = http.post("/generate", json={"prompt": f"told {turn}"}).json()
        with http.stream("GET", f"/jobs/{job['id']}/events") as answer:
            for _ in answer.iter_lines():
                pass  # until the job ends, and with it the stream
        return answer

    def _upload(self, http: httpx.Client, turn: int) -> httpx.Response:
        file = io.BytesIO()
        Image.new("RGB", (96, 96), (turn % 256, turn // 256 % 256, 90)).save(file, "PNG")
        return http.post("/upload", files={"file": (f"{turn}.png", file.getvalue())})
