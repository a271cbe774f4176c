"""A steady load of jobs and uploads of several owners. Clients retry for minutes and often send a request twice."""

import io
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any
from uuid import UUID

import httpx
import numpy as np
from PIL import Image

from shared.contracts.jobs import EventType, JobState

GIVE_UP_S = 180.0
"""No fault may keep the service from accepting requests for longer than this.

The time that the service asks a client to wait because of its own limits does not count.
"""
MOST_UNFINISHED = 30


@dataclass
class Submission:
    """One request, its allowed ends, and the job ids that it was answered with."""

    token: str
    owner: str
    route: str
    body: dict[str, Any]
    ends: frozenset[str] = frozenset({JobState.SUCCEEDED})
    """The final states that are correct for this job."""
    code: str | None = None
    """The error code with which the job has to end. `None`: no error is expected."""
    ids: set[UUID] = field(default_factory=set)
    """All job ids in the answers. There has to be exactly one, also when the request was sent several times."""

    @property
    def id(self) -> UUID:
        (job_id,) = self.ids
        return job_id

    @property
    def promised_events(self) -> frozenset[str]:
        """The event types for which a webhook was requested."""
        return frozenset(self.body.get("webhook", {}).get("events", ()))


class Load:
    """Jobs and uploads. The seed decides their contents, in the order of the calls. Many threads send them."""

    def __init__(
        self, apis: Sequence[str], *, keys: Mapping[str, str], seed: int, receiver_url: str, starter_share: float
    ) -> None:
        """keys: an API key of each owner, by the owner's name."""
        self._keys = keys
        self._random = random.Random(seed)
        self._composing = threading.Lock()
        self._tokens = count(1)
        self._receiver_url = receiver_url
        self._starter_share = starter_share
        self._apis = apis
        self._client = httpx.Client(timeout=10)
        self._pool = ThreadPoolExecutor(16, thread_name_prefix="client")
        self._sent: list[Future[None]] = []
        self._stop = threading.Event()
        self._pacer: threading.Thread | None = None
        self.submissions: list[Submission] = []
        self.uploads: defaultdict[str, set[UUID]] = defaultdict(set)
        """The image ids in the answers, by the token of the content. There has to be exactly one for each token."""
        self._files: dict[str, bytes] = {}
        """The uploaded files, by token."""
        self.refused: Counter[str] = Counter()
        """The answers with status 429, by error code."""
        self.server_errors: list[str] = []
        """The answers with status 500. No fault may cause one."""

    # --- requests -----------------------------------------------------------------------------------------------

    def jobs(self, number: int, *, words: str = "a red apple", **fixed: Any) -> list[Submission]:
        """Submit `number` jobs. Do not wait until they are accepted."""
        return [self._begin(self._composed(words, fixed)) for _ in range(number)]

    def job(self, *, words: str, ends: JobState, code: str | None, **fixed: Any) -> Submission:
        """Submit a job that has to end in the state `ends` with the error code `code`."""
        submission = self._composed(words, {"num_images": 1, **fixed})
        submission.ends, submission.code = frozenset({ends}), code
        return self._begin(submission)

    def upload(self, number: int, *, apis: Sequence[str] = ()) -> None:
        """Upload `number` new images, some of them twice. apis: upload each once through every one of these."""
        for _ in range(number):
            with self._composing:
                token = f"image-{next(self._tokens):05d}"
                pixels = np.random.default_rng(self._random.getrandbits(32)).integers(0, 256, (48, 48, 3), np.uint8)
                times = 2 if self._random.random() < 0.2 else 1
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            self._files[token] = file.getvalue()
            through: Sequence[str | None] = apis or [None] * times
            for api in through:
                self.upload_again(token, api=api)

    def upload_again(self, token: str, *, api: str | None = None) -> None:
        """Upload the file of this token. api: only through this one."""
        with self._composing:
            owner = self._random.choice(sorted(self._keys))
        self._sent.append(self._pool.submit(self._upload, token, owner, api))

    def flow(self, *, jobs_per_s: float, unfinished: Callable[[], int]) -> None:
        """Submit at this rate until `settle`, one upload to five jobs. Skip turns while many jobs are unfinished."""

        def pace() -> None:
            while not self._stop.wait(self._random.expovariate(jobs_per_s)):
                if unfinished() > MOST_UNFINISHED:
                    continue
                self.jobs(1)
                if self._random.random() < 0.2:
                    self.upload(1)

        self._pacer = threading.Thread(target=pace, name="load")
        self._pacer.start()

    def settle(self) -> list[str]:
        """End the flow and wait for all answers. Return the errors of the requests that were not accepted."""
        self._stop.set()
        if self._pacer is not None:
            self._pacer.join()
        errors = [sent.exception() for sent in self._sent]
        return [*(repr(error) for error in errors if error is not None), *self.server_errors]

    def wait_until_sent(self) -> None:
        """Wait until every request so far has been answered."""
        wait(self._sent)

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def headers(self, owner: str) -> dict[str, str]:
        """The headers of this owner's requests."""
        return {"Authorization": f"Bearer {self._keys[owner]}"}

    # --- sending --------------------------------------------------------------------------------------------------

    def _composed(self, words: str, fixed: dict[str, Any]) -> Submission:
        with self._composing:
            token = f"job-{next(self._tokens):05d}"
            body = {
                "prompt": f"{token} {words}",
                "num_images": self._random.choice([1, 1, 2, 4]),
                "seed": self._random.getrandbits(31),
                "num_inference_steps": self._random.choice([8, 8, 12]),
                "lane": self._random.choice(["high", "normal", "normal", "low", "bulk"]),
                "metadata": {"token": token},
                "model": "starter" if self._random.random() < self._starter_share else "cheap",
                "width": 64,
                "height": 64,
            }
            if self._random.random() < 0.5:
                events = [event for event in EventType if event.ends_job]
                more = self._random.choice([[], [EventType.STARTED], [EventType.QUEUED, EventType.REQUEUED]])
                body["webhook"] = {"url": self._receiver_url, "events": [*events, *more]}
            route = self._random.choice(["/generate", "/generate", "/rag/generate"])
            owner = self._random.choice(sorted(self._keys))
        return Submission(token, owner, route, body | fixed)

    def _begin(self, submission: Submission) -> Submission:
        self.submissions.append(submission)
        again, cancel = self._random.random(), self._random.random() < 0.03
        self._sent.append(self._pool.submit(self._submit, submission))
        if again < 0.05:  # at the same time
            self._sent.append(self._pool.submit(self._submit, submission))
        elif again < 0.2:  # later
            self._sent.append(self._pool.submit(self._submit, submission, times=2))
        if cancel and submission.code is None:
            submission.ends |= {JobState.CANCELED}
            self._sent.append(self._pool.submit(self._cancel, submission))
        return submission

    def _submit(self, submission: Submission, *, times: int = 1) -> None:
        for _ in range(times):
            headers = self.headers(submission.owner) | {"Idempotency-Key": submission.token}
            answer = self._until_answered("POST", submission.route, json=submission.body, headers=headers)
            assert answer.status_code == 202, answer.text
            submission.ids.add(UUID(answer.json()["id"]))

    def _cancel(self, submission: Submission) -> None:
        self._submit(submission)
        cancel, headers = f"/jobs/{submission.id}/cancel", self.headers(submission.owner)
        answer = self._until_answered("POST", cancel, headers=headers)
        if answer.status_code == 200:
            submission.ends = frozenset({JobState.CANCELED})
        else:  # The job had ended, or the answer to the first request was lost.
            assert answer.status_code == 409, answer.text

    def _upload(self, token: str, owner: str, api: str | None) -> None:
        files, headers = {"file": (f"{token}.png", self._files[token])}, self.headers(owner)
        answer = self._until_answered("POST", "/upload", files=files, headers=headers, apis=[api] if api else ())
        assert answer.status_code in (200, 201), answer.text
        self.uploads[token].add(UUID(answer.json()["images"][0]["id"]))

    def _until_answered(self, method: str, path: str, *, apis: Sequence[str] = (), **request: Any) -> httpx.Response:
        """Send to one API process after the other until one answers with a status below 500 and not with 429.

        Raises:
            AssertionError: no process has given such an answer after at least `GIVE_UP_S` seconds.
        """
        deadline = time.monotonic() + GIVE_UP_S
        problem = "none"
        for api in cycle(apis or self._apis):
            pause_s = 0.25
            try:
                answer = self._client.request(method, f"{api}/api/v1{path}", **request)
                if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
                    self.refused[answer.json()["code"]] += 1
                    pause_s = float(answer.headers["retry-after"])
                    deadline += pause_s
                elif answer.status_code < 500:
                    return answer
                elif answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
                    self.server_errors.append(f"{method} {path}: {answer.text}")
                problem = answer.text
            except httpx.TransportError as error:
                problem = repr(error)
            if time.monotonic() > deadline:
                break
            threading.Event().wait(pause_s)
        raise AssertionError(f"{method} {path} was never answered; the last problem was {problem}")
