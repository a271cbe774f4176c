"""A pass of hostile bulks: streams of lines with keys, values and bytes that no client sends on purpose.

A schema cannot express them. There are NUL and lone surrogates in keys, numbers of unclear meaning, repeated keys, and
bytes that are no text.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

TIMEOUT_S = 10
KEYS = (
    *("prompt", "custom_id", "kind", "metadata", "negative_prompt", "seed", "num_images", "width", "lane", "webhook"),
    *("mode", "filter", "reference_ids", "loras"),
)
TEXTS = (
    *("", " ", "\0", "a\0b", "\ud800", "\udc00\ud800", "\ufeff", "\u202e", "e\u0301", "\r\n", "\x1b[2J", "x" * 5000),
    *("__class__", "constructor", "%s%n", "{0}", "=1+1", "../../etc/passwd", "' or 1=1 --", "<script>", "null"),
)
NUMBERS = ("NaN", "-Infinity", "1e999", "-0", "01", "0x10", "1" * 5000, "1e-400", "18446744073709551616", "+1", ".5")


@dataclass(frozen=True)
class Raw:
    """JSON text that is written as it is."""

    text: str


Pairs = list[tuple[str, Any]]
"""An object, whose keys may repeat."""


def render(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list) and all(isinstance(each, tuple) for each in value):
        return "{" + ", ".join(f"{json.dumps(key)}: {render(each)}" for key, each in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(render, value)) + "]"
    return json.dumps(value)


texts = st.sampled_from(TEXTS) | st.text(max_size=20)
numbers = st.sampled_from(NUMBERS).map(Raw) | st.integers() | st.floats()
leaves = st.none() | st.booleans() | numbers | texts | st.just(Raw("[" * 2000 + "]" * 2000))
keys = st.sampled_from(KEYS) | texts
values = st.recursive(
    leaves, lambda each: st.lists(each, max_size=3) | st.lists(st.tuples(keys, each), max_size=3), max_leaves=6
)
lines = st.one_of(
    st.just(render({"prompt": "a cat"})),
    # A valid item with some hostile fields, which may repeat a field of it.
    st.lists(st.tuples(keys, values), max_size=4).map(lambda more: render([("prompt", "a cat"), *more])),
    st.dictionaries(texts, texts, min_size=1, max_size=3).map(
        lambda metadata: render({"prompt": "a cat", "metadata": metadata})
    ),
    values.map(render),
    texts,
)
options = st.sampled_from(["name", "defaults", "lane", "items", "metadata"]) | texts
headers = st.one_of(
    st.just(render({"bulk": {"on_invalid": "skip"}})),
    st.lists(st.tuples(options, values)).map(lambda more: render({"bulk": [("on_invalid", "skip"), *more]})),
)
bodies = st.tuples(st.lists(headers, max_size=1), st.lists(lines, min_size=1, max_size=5), st.binary(max_size=8)).map(
    lambda parts: b"\n".join([*(line.encode(errors="surrogatepass") for line in [*parts[0], *parts[1]]), parts[2]])
)
idempotency_keys = st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters="\x7f"), max_size=300)


@dataclass
class Pass:
    """The requests of one pass, and those that were answered with a server error or not in time."""

    url: str
    key: str
    requests: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def send(self, method: str, path: str, **request: Any) -> httpx.Response | None:
        """Send one request. `None` when no answer came in time."""
        self.requests += 1
        request["headers"] = {"Authorization": f"Bearer {self.key}"} | request.pop("headers", {})
        try:
            answer = httpx.request(method, f"{self.url}/api/v1{path}", timeout=TIMEOUT_S, **request)
        except httpx.TimeoutException:
            self._fail("ResponseTimeExceeded", method, path, request)
            return None
        if answer.is_server_error:
            self._fail("ServerError", method, path, request)
        return answer

    def _fail(self, kind: str, method: str, path: str, request: dict[str, Any]) -> None:
        self.failures.append({"type": kind, "count": 1, "request": f"{method} {path} {request.get('content')!r}"})


def run(url: str, key: str, *, examples: int, run_seed: int) -> Pass:
    """Send `examples` bulks and use each through every operation."""
    sent = Pass(url, key)
    numbered = count()

    @seed(run_seed)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies, bodies, lines, idempotency_keys)
    def send(body: bytes, other: bytes, line: str, idempotency_key: str) -> None:
        for path in ("/generate", "/rag/generate", "/search"):
            content = line.encode(errors="surrogatepass")
            sent.send("POST", path, content=content, headers={"Content-Type": "application/json"})
        unused = f"{next(numbered)}{idempotency_key}"
        headers = {"Idempotency-Key": unused.encode("latin-1"), "Content-Type": "application/jsonl"}
        created = sent.send("POST", "/bulks?complete=false", content=body, headers=headers)
        sent.send("POST", "/bulks", content=other, headers=headers)
        if created is not None and created.status_code == httpx.codes.ACCEPTED:
            use(sent, created.json(), other)

    send()
    return sent


def use(sent: Pass, bulk: dict[str, Any], more: bytes) -> None:
    path = f"/bulks/{bulk['id']}"
    jsonl = {"Content-Type": "application/jsonl"}
    appended = sent.send(
        "POST", f"{path}/lines?complete=false&from_line={bulk['received_lines']}", content=more, headers=jsonl
    )
    if appended is not None and appended.is_success:
        bulk = appended.json()
    sent.send("POST", f"{path}/complete", json={"lines": bulk["received_lines"], "digest": bulk["digest"]})
    for method, rest in _operations():
        sent.send(method, path + rest)


def _operations() -> Iterator[tuple[str, str]]:
    yield from (("GET", rest) for rest in ("", "/items", "/errors", "/manifest"))
    yield from (("POST", rest) for rest in ("/pause", "/resume", "/retry-failed", "/cancel"))
    yield from (("GET", rest) for rest in ("", "/items?state=canceled", "/manifest", "/archive"))
