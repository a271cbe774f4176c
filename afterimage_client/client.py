"""The way in: one object for one service."""

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import httpx
import pydantic

from afterimage_client.bulks import Bulks
from afterimage_client.connection import Connection, parsed, transport_errors_named
from afterimage_client.errors import error_of
from afterimage_client.images import Images
from afterimage_client.jobs import Jobs
from afterimage_client.outputs import Outputs
from shared.contracts.search import RagSearchQuery, RagSearchResponse, SearchRequest, SearchResponse
from shared.contracts.service import HealthView, ModelsResponse, StatsView

DEFAULT_URL = "http://127.0.0.1:8000"


class Afterimage:
    """A service, by its address. Safe to use from several threads; close it, or use it in a `with`.

        with Afterimage() as service:
            job = service.jobs.wait(service.jobs.submit(RagGenerateRequest(prompt="a red apple")))
            service.outputs.download(job.outputs[0], Path("apple.png"))

    Every call is tried again for `retry_for_s` seconds while the service is away, busy or too busy, as it advises by
    `Retry-After`; none of them does anything twice by that.

    Args:
        url: without `/api/v1`; none: the environment's AFTERIMAGE_URL, else `http://127.0.0.1:8000`.
        api_key: none: the environment's AFTERIMAGE_API_KEY; it is shown nowhere.
        timeout_s: longest silence of a connection.
        retry_for_s: 0 for no second try.
        transport: how to reach the service instead of by network, such as `httpx.WSGITransport`.

    Raises:
        ValueError: that is no http address, or no key.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30,
        retry_for_s: float = 60,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        address = httpx.URL(url or os.environ.get("AFTERIMAGE_URL") or DEFAULT_URL)
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"{address} is no address such as {DEFAULT_URL}")
        key = api_key or os.environ.get("AFTERIMAGE_API_KEY")
        self.url = str(address).rstrip("/")
        self._connection = Connection(
            httpx.Client(
                base_url=f"{self.url}/api/v1",
                auth=_Bearer(key) if key else None,
                timeout=timeout_s,
                headers={"User-Agent": "afterimage-client"},
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
                transport=transport,
            ),
            retry_for_s=retry_for_s,
        )
        self.jobs = Jobs(self._connection)
        self.outputs = Outputs(self._connection)
        self.images = Images(self._connection)
        self.bulks = Bulks(self._connection)

    def search(self, request: SearchRequest) -> SearchResponse:
        """Find images of the corpus by words, by an image, or by both."""
        body = request.model_dump(mode="json", exclude_unset=True)
        return self._connection.post(SearchResponse, "/search", json=body)

    def references(self, query: RagSearchQuery) -> RagSearchResponse:
        """What a generation would draw from for this prompt, and why; pin it by its ids as `reference_ids`."""
        return self._connection.get(
            RagSearchResponse, "/rag/search", params=query.model_dump(mode="json", exclude_unset=True)
        )

    def models(self) -> ModelsResponse:
        """The generators and what each can do."""
        return self._connection.get(ModelsResponse, "/models")

    def stats(self) -> StatsView:
        return self._connection.get(StatsView, "/stats")

    def health(self) -> HealthView:
        """How every part is doing; asked once, and 503 is an answer here."""
        with transport_errors_named("GET", "/health"):
            response = self._connection.http.get("/health")
        try:
            return parsed(HealthView, response)
        except pydantic.ValidationError:
            raise error_of(response) from None

    def sleep(self, seconds: float) -> None:
        """Wait between two calls; `close` ends it.

        Raises:
            AfterimageError: the client was closed meanwhile.
        """
        self._connection.pause(seconds)

    def close(self) -> None:
        """Also ends pauses between tries in other threads, at once."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Afterimage({httpx.URL(self.url)!r})"


class _Bearer(httpx.Auth):
    """Sends the key; httpx leaves it out when it is led to another host. No `repr` shows it."""

    def __init__(self, key: str) -> None:
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("an API key is one word of ASCII characters")  # without repeating it
        self._header = f"Bearer {key}"

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        request.headers["Authorization"] = self._header
        yield request
