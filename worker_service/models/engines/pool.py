"""The engines of one generator: which of them gets an image, and what happens when one is busy or away.

All calls run in one event loop, on a thread of its own. So the state of an engine needs no lock, and a call that is
canceled closes its connection.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Collection, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from shared.errors import EngineUnavailableError, InvalidOutputError
from shared.metrics import ENGINE_CALLS, increment_counter
from shared.settings import EngineSettings
from worker_service.models.engines.call import BUSY, Call, error_of, retry_after_s

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

MAX_ANSWER_BYTES = 128 * 2**20
"""An image of 4096 x 4096 pixels that does not compress has 67 MB in base64."""
MAX_ERROR_BYTES = 64 * 1024
REST_S, MAX_REST_S = 1.0, 60.0
"""Seconds in which a busy engine gets no image, unless it says another number, and at most."""
CHECK_TIMEOUT_S = 1.0


@dataclass(eq=False)
class Engine:
    """One engine. Only the event loop changes it."""

    url: str
    in_flight: int = 0
    calls: int = 0
    rests_until: float = 0.0
    """`time.monotonic()` until which it gets no image, because it was busy."""
    is_away: bool = True
    """Its last call had no answer, and it has not answered a check since. It gets an image only when all are away."""

    @property
    def rests(self) -> bool:
        return time.monotonic() < self.rests_until


class EnginePool:
    """Sends calls to the engine with the fewest in flight. Any thread may use it."""

    def __init__(self, settings: EngineSettings, *, model: str) -> None:
        """model: name of the generator, for the log."""
        self.engines = [Engine(url) for url in settings.urls]
        self.concurrency = settings.concurrency
        """Calls in flight at each engine, at most."""
        self._settings = settings
        self._model = model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"engines-{model}", daemon=True)
        self._thread.start()
        self._changed, self._client = self._run(self._open())

    def submit(self, call: Call, *, only: Engine | None = None) -> Future[bytes]:
        """Send a call; the future has the body of the answer. To cancel the future closes the connection.

        An engine that fails leaves the call to the others. only: no other engine gets the call.

        The future raises:
            EngineUnavailableError: no engine has answered, or all are busy.
            EngineRefusedError: an engine refused the request.
            InvalidOutputError: the answer is too large.
        """
        return asyncio.run_coroutine_threadsafe(self._draw(call, [only] if only else self.engines), self._loop)

    def is_available(self) -> bool:
        """Whether an engine takes images now. It asks the absent ones, and waits `CHECK_TIMEOUT_S` at most."""
        return not self._loop.is_closed() and self._run(self._check())

    def close(self) -> None:
        """Close all connections. Running calls raise `CancelledError`."""
        if not self._loop.is_closed():
            self._run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self) -> tuple[asyncio.Condition, httpx.AsyncClient]:
        key = self._settings.api_key
        client = httpx.AsyncClient(
            # A small compressed answer could become a large one.
            headers={"accept-encoding": "identity"}
            | ({} if key is None else {"authorization": f"Bearer {key.get_secret_value()}"}),
            timeout=httpx.Timeout(None, connect=self._settings.connect_timeout_s),  # `_send` limits the sum
            # An engine may close a kept connection at the moment when the next call begins to use it.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            follow_redirects=False,
            trust_env=False,
        )
        return asyncio.Condition(), client

    async def _end(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._client.aclose()

    async def _draw(self, call: Call, engines: Collection[Engine]) -> bytes:
        failed: dict[Engine, EngineUnavailableError] = {}
        while (engine := await self._take([each for each in engines if each not in failed])) is not None:
            try:
                return await self._send(engine, call)
            except EngineUnavailableError as error:
                failed[engine] = error
                fields = {"model": self._model, "engine": engine.url, "cause": error.message}
                logger.warning("engine_failed", extra=fields)
            finally:
                engine.in_flight -= 1
                async with self._changed:
                    self._changed.notify_all()
        raise _combined([*failed.values()], [each for each in engines if each.rests])

    async def _take(self, engines: Collection[Engine]) -> Engine | None:
        """Wait for an engine that takes one more call; None when all of these are busy."""
        async with self._changed:
            while usable := [each for each in engines if not each.rests]:
                present = [each for each in usable if not each.is_away] or usable
                if free := [each for each in present if each.in_flight < self.concurrency]:
                    chosen = min(free, key=lambda each: (each.in_flight, each.calls))
                    chosen.in_flight += 1
                    chosen.calls += 1
                    return chosen
                await self._changed.wait()
        return None

    async def _send(self, engine: Engine, call: Call) -> bytes:
        try:
            async with (
                asyncio.timeout(self._settings.timeout_s),
                self._client.stream("POST", f"{engine.url}/{call.path}", **call.content()) as answer,
            ):
                status, headers = answer.status_code, answer.headers
                body = await _read(answer, MAX_ANSWER_BYTES if status == 200 else MAX_ERROR_BYTES)
        except TimeoutError:
            self._lose(engine)
            raise EngineUnavailableError("The engine did not answer in time.") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._lose(engine)
            raise EngineUnavailableError(f"The engine cannot be reached ({type(error).__name__}).") from None
        engine.is_away = False
        if status == 200:
            self._count(engine, "drawn")
            if len(body) > MAX_ANSWER_BYTES:
                raise InvalidOutputError(f"The engine's answer has more than {MAX_ANSWER_BYTES} bytes.")
            return body
        failure = error_of(status, headers, body)
        refused = not isinstance(failure, EngineUnavailableError)
        self._count(engine, "refused" if refused else "busy" if status in BUSY else "failed")
        if status in BUSY:
            engine.rests_until = time.monotonic() + min(retry_after_s(headers) or REST_S, MAX_REST_S)
        # Without the body: it may repeat the prompt.
        fields = {"model": self._model, "engine": engine.url, "status": status, "cause": failure.code}
        logger.warning("engine_answered", extra=fields)
        raise failure

    def _lose(self, engine: Engine) -> None:
        engine.is_away = True
        self._count(engine, "unreachable")

    def _count(self, engine: Engine, outcome: str) -> None:
        labels = {"model": self._model, "engine": engine.url, "outcome": outcome}
        increment_counter(ENGINE_CALLS, labels=labels)

    async def _check(self) -> bool:
        await asyncio.gather(*(self._ask(each) for each in self.engines if each.is_away))
        return any(not each.is_away and not each.rests for each in self.engines)

    async def _ask(self, engine: Engine) -> None:
        """Ask an engine for its models. Any answer but that of a server without its engine shows that it is back."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                answer = await self._client.get(f"{engine.url}/models")
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL):
            return
        if answer.status_code not in BUSY:
            engine.is_away = False
            logger.info("engine_answers", extra={"model": self._model, "engine": engine.url})


async def _read(answer: httpx.Response, limit: int) -> bytes:
    """The body, or its beginning if it has more than `limit` bytes, which is then longer than `limit`."""
    body = bytearray()
    async for chunk in answer.aiter_raw():
        body += chunk
        if len(body) > limit:
            break
    return bytes(body)


def _combined(failures: list[EngineUnavailableError], resting: list[Engine]) -> EngineUnavailableError:
    """One error for all engines. It asks for a retry when the first of them takes images again."""
    told = [error.retry_after_s for error in failures if error.retry_after_s is not None]
    told += [max(1, round(each.rests_until - time.monotonic())) for each in resting]
    message = failures[-1].message if failures else "The engine is busy."
    return EngineUnavailableError(message, retry_after_s=min(told) if told else None)
