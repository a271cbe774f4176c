"""The asynchronous client has the methods of the blocking one, and its waits leave the event loop free."""

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest

from afterimage_client import (
    Afterimage,
    AfterimageError,
    AsyncAfterimage,
    GenerateRequest,
    JobFailedError,
    JobState,
    JobView,
    NotFoundError,
    RagGenerateRequest,
    UnreachableError,
    WaitTimeoutError,
)
from tests.unit.test_client import (
    CONTENT,
    JOB,
    Answer,
    ScriptedServer,
    closed_address,
    job_body,
    output,
    problem,
    stream,
)


def served(work: Callable[[AsyncAfterimage], Coroutine[Any, Any, object]], *answers: Answer, **options: Any) -> Any:
    """Run `work` with a client of a server with these answers; return its result and the requests."""
    server = ScriptedServer(list(answers))

    async def run() -> object:
        async with AsyncAfterimage(server.url, **({"retry_for_s": 10} | options)) as service:
            return await work(service)

    try:
        return asyncio.run(run()), server.requests
    finally:
        server.close()


def test_every_method_of_the_blocking_client_exists_with_the_same_parameters() -> None:
    blocking, other = Afterimage("http://localhost"), AsyncAfterimage("http://localhost")
    resources = [name for name, value in vars(blocking).items() if type(value).__module__.startswith("afterimage_")]
    compared = 0
    for name in ("", *(name for name in resources if not name.startswith("_"))):
        here, there = (getattr(client, name) if name else client for client in (blocking, other))
        for method, function in inspect.getmembers(here, inspect.ismethod):
            if not method.startswith("_"):
                assert inspect.signature(getattr(there, method)) == inspect.signature(function), (name, method)
                compared += 1
    assert compared > 50


def test_a_lost_answer_is_repeated_with_the_same_idempotency_key() -> None:
    async def work(service: AsyncAfterimage) -> JobView:
        return await service.jobs.submit(RagGenerateRequest(prompt="p", seed=7))

    answers = [Answer(cut=-1), problem(503, "queue_full", Retry_After="0"), Answer(202, job_body())]
    job, requests = served(work, *answers)
    assert job.id == JOB
    assert len({request.headers["Idempotency-Key"] for request in requests}) == 1
    assert [request.body for request in requests] == [b'{"prompt":"p","seed":7}'] * 3


def test_a_job_is_followed_over_a_broken_stream_and_its_output_downloaded(tmp_path: Path) -> None:
    made = output()
    done = job_body("succeeded", 3, outputs=[made.model_dump(mode="json")])
    events = stream((1, "queued"), (0, "progress"), cut=True), stream((2, "started"), (3, "succeeded"))

    async def work(service: AsyncAfterimage) -> object:
        seen = [update.seq async for update in service.jobs.follow(JOB)]
        job = await service.jobs.get(JOB)
        await service.outputs.download(job.outputs[0], tmp_path / "a.png")
        return seen, job.state

    answers = [*events, Answer(200, done), Answer(200, CONTENT, cut=3), Answer(200, CONTENT)]
    seen, _ = served(work, *answers)
    assert seen == ([1, 1, 2, 3], JobState.SUCCEEDED)
    assert (tmp_path / "a.png").read_bytes() == CONTENT


def test_other_tasks_run_while_the_client_waits_between_tries() -> None:
    async def work(service: AsyncAfterimage) -> int:
        waiting = asyncio.create_task(service.jobs.get(JOB))
        turns = 0
        while not waiting.done():
            await asyncio.sleep(0.01)
            turns += 1
        await waiting
        return turns

    turns, _ = served(work, problem(503, "database_unavailable", Retry_After="1"), Answer(200, job_body()))
    assert turns > 10


def test_calls_run_at_the_same_time() -> None:
    async def work(service: AsyncAfterimage) -> object:
        return await asyncio.gather(*(service.jobs.get(JOB) for _ in range(20)))

    # The service asks each first try to wait for a second.
    answers = [problem(503, "queue_full", Retry_After="1")] * 20 + [Answer(200, job_body())] * 20
    started = time.monotonic()
    jobs, requests = served(work, *answers, retry_for_s=30)
    assert (len(jobs), len(requests)) == (20, 40)
    assert time.monotonic() - started < 15


def test_a_canceled_task_stops_its_call_and_the_client_stays_usable() -> None:
    async def work(service: AsyncAfterimage) -> object:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(service.jobs.get(JOB), 0.3)
        return await service.jobs.get(JOB)

    job, requests = served(work, problem(503, "queue_full", Retry_After="8"), Answer(200, job_body()))
    assert (job.id, len(requests)) == (JOB, 2)


def test_closing_ends_the_retry_pauses_of_other_tasks() -> None:
    async def work(service: AsyncAfterimage) -> None:
        waiting = asyncio.create_task(service.jobs.get(JOB))
        await asyncio.sleep(0.3)
        await service.close()
        with pytest.raises(AfterimageError, match="closed"):
            await asyncio.wait_for(waiting, 5)

    served(work, problem(503, "queue_full", Retry_After="20"), retry_for_s=60)


def test_lists_are_iterated_page_by_page_and_may_be_left_early() -> None:
    page = Answer(200, b'{"items": [%s], "next_cursor": "c"}' % job_body())

    async def work(service: AsyncAfterimage) -> int:
        async with aclosing(service.jobs.list()) as jobs:  # type: ignore[type-var]
            number = 0
            async for _ in jobs:
                number += 1
                if number == 2:
                    break
        return number

    number, requests = served(work, page, page)
    assert (number, [request.path.rpartition("?")[2] for request in requests]) == (
        2,
        ["limit=100", "limit=100&cursor=c"],
    )


def test_errors_are_those_of_the_blocking_client() -> None:
    async def work(service: AsyncAfterimage) -> None:
        with pytest.raises(NotFoundError):
            await service.jobs.get(JOB)
        with pytest.raises(WaitTimeoutError):
            await service.jobs.wait(JOB, timeout_s=0)
        with pytest.raises(JobFailedError):
            await service.run(GenerateRequest(prompt="p"))

    failed = job_body("failed", 2, error={"code": "model_error", "detail": "d"})
    answers = [problem(404, "not_found"), Answer(200, job_body()), Answer(202, job_body())]
    served(work, *answers, stream((2, "failed")), Answer(200, failed))

    async def refused() -> None:
        async with AsyncAfterimage(closed_address(), retry_for_s=0) as service:
            await service.models()

    with pytest.raises(UnreachableError):
        asyncio.run(refused())


def test_the_key_is_sent_also_beside_a_password_in_the_address() -> None:
    seen: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(200, content=job_body())

    async def ask() -> None:
        transport = httpx.MockTransport(answer)
        async with AsyncAfterimage("http://user:secret@host", api_key="ai_key", transport=transport) as service:
            await service.jobs.get(JOB)
            assert "secret" not in repr(service)
            assert "AsyncAfterimage" in repr(service)

    asyncio.run(ask())
    assert seen == ["Bearer ai_key"]
