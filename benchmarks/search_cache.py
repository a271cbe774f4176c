"""How much faster is a cached search?

    make up && . var/stack.env && .venv/bin/python -m benchmarks.search_cache

Times `POST /search` by text over one kept-alive connection to a running stack. Each text is searched three times. The
first time CLIP must embed it. The second time the corpus has changed, so only the vector is cached. The third time the
answer is cached. The corpus is changed by writing a caption back as it was.

The gain on hits is not the gain of a service. With hit rate h the mean request is 1 / ((1 - h) + h * hit / miss) times
faster. The benchmark prints this for several h, and the h at which the mean reaches 15.
"""

import argparse
import os
import secrets
import statistics
import time

import httpx

from benchmarks.conditions import report

HIT_RATES = (0.25, 0.5, 0.75, 0.87, 0.95)
CLAIM = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=os.environ.get("AFTERIMAGE_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--texts", type=int, default=100, help="distinct texts (default: %(default)s)")
    arguments = parser.parse_args()
    with httpx.Client(base_url=f"{arguments.url}/api/v1", timeout=60) as api:
        newest = api.get("/images", params={"limit": 1, "state": "ready"}).raise_for_status().json()["items"]
        if not newest:
            raise SystemExit("the corpus is empty: index some images first (make demo)")
        corpus = api.get("/stats").raise_for_status().json()["images"]
        cold, warm, hit, floor = [], [], [], []
        search(api, secrets.token_hex(8))  # warms up connections and code, with another text than those below
        for _ in range(arguments.texts):
            text = f"a {secrets.token_hex(4)} thing"
            cold.append(search(api, text))
            touch(api, newest[0])
            warm.append(search(api, text))
            hit.append(search(api, text))
            floor.append(timed(lambda: api.get("/health/live", follow_redirects=True)))
    miss_s, known_s, hit_s = (statistics.median(times) for times in (cold, warm, hit))
    needed = (1 - 1 / CLAIM) / (1 - hit_s / miss_s)
    figures: dict[str, object] = {
        "not cached (p50, p95)": milliseconds(cold),
        "vector cached, corpus changed": milliseconds(warm),
        "answer cached": milliseconds(hit),
        "a request that does nothing": milliseconds(floor),
        "gain on hits": f"{miss_s / hit_s:.1f}x (vector cached: {known_s / hit_s:.1f}x)",
    }
    for rate in HIT_RATES:
        figures[f"mean gain at {rate:.0%} hits"] = f"{1 / ((1 - rate) + rate * hit_s / miss_s):.1f}x"
    reachable = f"{needed:.1%} hits" if needed <= 1 else "no hit rate: a hit itself is not 15x faster"
    figures[f"mean gain of {CLAIM}x needs"] = reachable
    report("Cached against uncached search", figures, url=arguments.url, texts=arguments.texts, corpus=corpus)


def search(api: httpx.Client, text: str) -> float:
    return timed(lambda: api.post("/search", json={"query": text, "k": 10}))


def timed(call: object) -> float:
    """Return the seconds of one request, which must succeed."""
    assert callable(call)
    started = time.perf_counter()
    call().raise_for_status()
    return time.perf_counter() - started


def touch(api: httpx.Client, image: dict[str, object]) -> None:
    """Give the collection a new version, so that cached answers are not used any more."""
    api.patch(f"/images/{image['id']}", json={"caption": image["caption"]}).raise_for_status()


def milliseconds(times: list[float]) -> str:
    return f"{statistics.median(times) * 1000:.1f} ms, {statistics.quantiles(times, n=20)[-1] * 1000:.1f} ms"


if __name__ == "__main__":
    main()
