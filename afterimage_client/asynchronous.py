"""The asynchronous client: the methods of `Afterimage`, each awaited or iterated with `async for`."""

import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import anyio
import httpx

from afterimage_client import greenlets
from afterimage_client.bulks import Bulks
from afterimage_client.client import Afterimage
from afterimage_client.collections import Collections
from afterimage_client.images import Images
from afterimage_client.jobs import Jobs
from afterimage_client.outputs import Outputs

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Blocking = TypeVar("Blocking")


class _Wrapper(Generic[Blocking]):
    """Runs the methods of a blocking object in the event loop."""

    def __init__(self, blocking: Blocking) -> None:
        self._blocking = blocking


def _awaited(
    method: Callable[Concatenate[Blocking, Parameters], Result],
) -> Callable[Concatenate[_Wrapper[Blocking], Parameters], Coroutine[Any, Any, Result]]:
    @wraps(method)
    async def call(self: _Wrapper[Blocking], /, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        return await greenlets.run(partial(method, self._blocking, *arguments, **named))

    return call


def _iterated(
    method: Callable[Concatenate[Blocking, Parameters], Iterator[Result]],
) -> Callable[Concatenate[_Wrapper[Blocking], Parameters], AsyncIterator[Result]]:
    @wraps(method)
    async def iterate(
        self: _Wrapper[Blocking], /, *arguments: Parameters.args, **named: Parameters.kwargs
    ) -> AsyncIterator[Result]:
        iterator = method(self._blocking, *arguments, **named)
        end = object()
        try:
            while (item := await greenlets.run(partial(next, iterator, end))) is not end:
                yield item
        finally:
            if inspect.isgenerator(iterator):
                # Its connection is closed also where the task was canceled.
                with anyio.CancelScope(shield=True):
                    await greenlets.run(iterator.close)

    return iterate


class AsyncJobs(_Wrapper[Jobs]):
    """`AsyncAfterimage.jobs`"""

    submit = _awaited(Jobs.submit)
    dry_run = _awaited(Jobs.dry_run)
    get = _awaited(Jobs.get)
    list = _iterated(Jobs.list)
    wait = _awaited(Jobs.wait)
    follow = _iterated(Jobs.follow)
    events = _iterated(Jobs.events)
    cancel = _awaited(Jobs.cancel)
    retry = _awaited(Jobs.retry)
    delete = _awaited(Jobs.delete)
    reference_content = _awaited(Jobs.reference_content)


class AsyncOutputs(_Wrapper[Outputs]):
    """`AsyncAfterimage.outputs`"""

    get = _awaited(Outputs.get)
    list = _iterated(Outputs.list)
    change = _awaited(Outputs.change)
    content = _awaited(Outputs.content)
    download = _awaited(Outputs.download)
    replay = _awaited(Outputs.replay)
    remember = _awaited(Outputs.remember)
    delete = _awaited(Outputs.delete)


class AsyncImages(_Wrapper[Images]):
    """`AsyncAfterimage.images`"""

    upload = _awaited(Images.upload)
    get = _awaited(Images.get)
    list = _iterated(Images.list)
    change = _awaited(Images.change)
    delete = _awaited(Images.delete)
    withdraw = _awaited(Images.withdraw)
    generations = _iterated(Images.generations)
    content = _awaited(Images.content)
    download = _awaited(Images.download)


class AsyncBulks(_Wrapper[Bulks]):
    """`AsyncAfterimage.bulks`"""

    create = _awaited(Bulks.create)
    send = _awaited(Bulks.send)
    get = _awaited(Bulks.get)
    list = _iterated(Bulks.list)
    items = _iterated(Bulks.items)
    errors = _iterated(Bulks.errors)
    wait = _awaited(Bulks.wait)
    pause = _awaited(Bulks.pause)
    resume = _awaited(Bulks.resume)
    cancel = _awaited(Bulks.cancel)
    retry_failed = _awaited(Bulks.retry_failed)
    manifest = _iterated(Bulks.manifest)


class AsyncCollections(_Wrapper[Collections]):
    """`AsyncAfterimage.collections`"""

    create = _awaited(Collections.create)
    get = _awaited(Collections.get)
    find = _awaited(Collections.find)
    list = _iterated(Collections.list)
    change = _awaited(Collections.change)
    delete = _awaited(Collections.delete)
    grants = _iterated(Collections.grants)
    share = _awaited(Collections.share)
    unshare = _awaited(Collections.unshare)


class _Bridged(Afterimage):
    _new_flag = greenlets.Flag


class AsyncAfterimage(_Wrapper[Afterimage]):
    """`Afterimage` for asyncio and Trio. Use it in an `async with`, or close it.

        async with AsyncAfterimage() as service:
            pictures = await asyncio.gather(*(service.run(prompt) for prompt in prompts))

    Arguments, methods and errors are those of `Afterimage`. Callbacks such as `on_update` are plain functions.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30,
        retry_for_s: float = 60,
        connect_for_s: float = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        blocking = _Bridged(
            url,
            api_key=api_key,
            timeout_s=timeout_s,
            retry_for_s=retry_for_s,
            connect_for_s=connect_for_s,
            transport=greenlets.Transport(httpx.AsyncClient(limits=limits, transport=transport)),
        )
        super().__init__(blocking)
        self.url = blocking.url
        self.jobs = AsyncJobs(blocking.jobs)
        self.outputs = AsyncOutputs(blocking.outputs)
        self.images = AsyncImages(blocking.images)
        self.bulks = AsyncBulks(blocking.bulks)
        self.collections = AsyncCollections(blocking.collections)

    run = _awaited(Afterimage.run)
    search = _awaited(Afterimage.search)
    references = _awaited(Afterimage.references)
    models = _awaited(Afterimage.models)
    stats = _awaited(Afterimage.stats)
    health = _awaited(Afterimage.health)
    sleep = _awaited(Afterimage.sleep)
    close = _awaited(Afterimage.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.close()

    def __repr__(self) -> str:
        return repr(self._blocking).replace("_Bridged", "AsyncAfterimage", 1)
