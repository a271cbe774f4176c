"""The client object: one `Afterimage` for one service."""

import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import httpx
import pydantic

from afterimage_client import login
from afterimage_client.bulks import Bulks
from afterimage_client.collections import Collections
from afterimage_client.connection import Connection, Flag, parse_response, sent_tags, translate_transport_errors
from afterimage_client.errors import InvalidInputError, JobFailedError, error_from_response
from afterimage_client.images import Images
from afterimage_client.jobs import Jobs, Update
from afterimage_client.outputs import Outputs
from afterimage_client.picture import Picture
from afterimage_client.requests import Reference, generation_request
from shared.contracts.generation import GenerateRequest
from shared.contracts.jobs import JobState
from shared.contracts.search import RagSearchQuery, RagSearchResponse, SearchRequest, SearchResponse
from shared.contracts.service import HealthView, ModelsResponse, StatsView


class Afterimage:
    """A client of the service at one address. Several threads may share it. Close it, or use it in a `with`.

        with Afterimage() as service:
            service.run("a red apple", references=["sketch.png"])[0].save("out/apple.png")

    Temporary errors (the service is unreachable, overloaded, or limits the rate) are retried for `retry_for_s` seconds,
    not before its `Retry-After`. A retry never repeats a side effect.

    Args:
        url: address without `/api/v1`; None: AFTERIMAGE_URL of the environment, else the address that
            `afterimage login` stored, else `http://127.0.0.1:8000`.
        api_key: None: AFTERIMAGE_API_KEY of the environment, else the key that `afterimage login` stored for the same
            address. The key is never printed or logged.
        timeout_s: longest time without data on a connection.
        retry_for_s: 0: no retries.
        connect_for_s: how long a failed connection is retried before the service has answered once. The address is
            probably wrong then, so a warning is logged too.
        transport: used instead of the network, for example `httpx.WSGITransport`.

    Raises:
        InvalidInputError: `url` is not an http address, or `api_key` is not one word of ASCII characters.
    """

    _new_flag: Callable[[], Flag] = threading.Event

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30,
        retry_for_s: float = 60,
        connect_for_s: float = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        given, key = login.resolve(url, api_key)
        address = _parsed(given)
        if address.scheme not in ("http", "https") or not address.host:
            raise InvalidInputError(f"{address} is not an address such as {login.DEFAULT_URL}")
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
            connect_for_s=connect_for_s,
            closed=type(self)._new_flag(),
        )
        self.jobs = Jobs(self._connection)
        self.outputs = Outputs(self._connection)
        self.images = Images(self._connection)
        self.bulks = Bulks(self._connection)
        self.collections = Collections(self._connection)

    def run(
        self,
        /,
        prompt: str | GenerateRequest,
        *,
        references: Sequence[Reference] = (),
        timeout_s: float | None = None,
        on_update: Callable[[Update], object] | None = None,
        **fields: Any,
    ) -> list[Picture]:
        """Draw images, wait for them, and return them in the order of their seeds.

            (picture,) = service.run("a green heart", seed=7)

        Args:
            prompt: a text, or a whole request. A text draws from references: the given ones, or found ones.
            references: files (path or bytes) and images of the corpus (object or id).
            timeout_s: None: wait without a limit.
            on_update: called with every update of the job.
            fields: further fields of `RagGenerateRequest`, such as `num_images` and `seed`.

        Raises:
            InvalidInputError: a field is invalid, or a file cannot be read. No request was sent.
            JobFailedError: the job failed, or was canceled.
            WaitTimeoutError: the job has not ended within `timeout_s`; it still runs.
        """
        if isinstance(prompt, str):
            request: GenerateRequest = generation_request(prompt, references=references, **fields)
        elif references or fields:
            raise InvalidInputError("references and fields belong to a prompt; a request has its own")
        else:
            request = prompt
        job = self.jobs.wait(self.jobs.submit(request), timeout_s=timeout_s, on_update=on_update)
        if job.state is not JobState.SUCCEEDED:
            raise JobFailedError(job)
        return [Picture(output, self.outputs.content(output)) for output in job.outputs]

    def search(self, request: SearchRequest) -> SearchResponse:
        """Search images of the corpus by texts, by images, or by both: alone, mixed by weight, or as what to avoid."""
        body = request.model_dump(mode="json", exclude_unset=True)
        return self._connection.post(SearchResponse, "/search", json=body)

    def references(self, query: RagSearchQuery) -> RagSearchResponse:
        """Return the references that a generation would use for this prompt, and why.

        To draw from exactly these later, send the `plan` of the answer.
        """
        params = query.model_dump(mode="json", exclude_unset=True)
        if "tags" in params:
            params["tags"] = sent_tags(params["tags"])
        return self._connection.get(RagSearchResponse, "/rag/search", params=params)

    def models(self) -> ModelsResponse:
        """Return the generators with their capabilities."""
        return self._connection.get(ModelsResponse, "/models")

    def stats(self) -> StatsView:
        return self._connection.get(StatsView, "/stats")

    def health(self) -> HealthView:
        """Return the health of every part. The request is not retried, and a 503 is an answer, not an error."""
        with translate_transport_errors("GET", "/health"):
            response = self._connection.http.get("/health")
        try:
            return parse_response(HealthView, response)
        except pydantic.ValidationError:
            raise error_from_response(response) from None

    def sleep(self, seconds: float) -> None:
        """Wait between two calls; `close` interrupts it.

        Raises:
            AfterimageError: the client was closed during the wait.
        """
        self._connection.pause(seconds)

    def close(self) -> None:
        """Close the connections, and interrupt pauses between tries in other threads at once."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({httpx.URL(self.url)!r})"


def _parsed(address: str) -> httpx.URL:
    try:
        return httpx.URL(address)
    except httpx.InvalidURL as error:
        raise InvalidInputError(f"{address!r} is not an address: {error}") from None


class _Bearer(httpx.Auth):
    """Sends the key, except on redirects to another host. No `repr` shows it."""

    def __init__(self, key: str) -> None:
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise InvalidInputError("an API key is one word of ASCII characters")  # without the key in the message
        self._header = f"Bearer {key}"

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        request.headers["Authorization"] = self._header
        yield request
