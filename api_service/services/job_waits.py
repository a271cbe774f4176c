"""Requests that wait for a job. One reader looks at the jobs of all of them, so the database has one client."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from uuid import UUID

from api_service.services import views
from shared.contracts.jobs import JobState, JobView, Preview, Progress
from shared.db import jobs
from shared.db.session import session_scope
from shared.errors import BaseAppException
from shared.messaging.job_updates import LOOK_AGAIN_S, subscriber
from shared.singleton import process_singleton


class JobWait:
    """One request that waits until its job has ended, or has an event with a number above `after`."""

    def __init__(self, job_id: UUID, *, after: int | None) -> None:
        self.job_id = job_id
        self.result = Future[JobView | None]()
        """The job if it has ended; None when the request should read the job itself."""
        self._after = after
        # Kept here, because `subscriber` waits while another thread closes it, and that thread calls `on_change`.
        self._subscriber = subscriber()

    def is_over(self, state: JobState, seq: int) -> bool:
        return state.is_final or (self._after is not None and seq > self._after)

    def end(self, result: JobView | None) -> None:
        if not self.result.done():
            self.result.set_result(result)

    def on_change(self) -> None:
        """The subscriber of job updates calls this."""
        if self._subscriber.closing:
            self.end(None)
        job_reader().look(self.job_id)

    def on_progress(self, progress: Progress) -> None: ...

    def on_preview(self, preview: Preview) -> None: ...


class JobReader:
    """A thread that reads the jobs for which requests wait. It runs while there is such a request.

    It reads the states of all jobs that changed since its last read in one statement, and then those that have ended.
    A notification can be lost. So it looks at all jobs every few seconds, also in one statement.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waits: dict[UUID, set[JobWait]] = {}
        self._to_read: set[UUID] = set()
        self._running = False

    @contextmanager
    def waiting(self, wait: JobWait) -> Iterator[None]:
        """Look at the job of `wait` now and after each change, until the block ends."""
        with self._changed:
            self._waits.setdefault(wait.job_id, set()).add(wait)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="job-reader", daemon=True).start()
        try:
            with subscriber().listen(wait.job_id, wait):
                wait.on_change()
                yield
        finally:
            with self._changed:
                remaining = self._waits[wait.job_id]
                remaining.discard(wait)
                if not remaining:
                    del self._waits[wait.job_id]
                self._changed.notify()

    def look(self, job_id: UUID) -> None:
        """Read the job soon, because it may have changed."""
        with self._changed:
            self._to_read.add(job_id)
            self._changed.notify()

    def _run(self) -> None:
        while waits := self._next_waits():
            try:
                self._read(waits)
            except BaseAppException as error:
                for wait in waits:
                    if not wait.result.done():
                        wait.result.set_exception(error)

    def _next_waits(self) -> list[JobWait]:
        """Wait for changed jobs; return the requests that wait for them, and an empty list when no request waits."""
        with self._changed:
            while self._waits:
                timeout_s = LOOK_AGAIN_S[subscriber().connected]
                notified = self._changed.wait_for(lambda: self._to_read or not self._waits, timeout_s)
                ids, self._to_read = self._to_read if notified else set(self._waits), set()
                waits = [wait for job_id in ids for wait in self._waits.get(job_id, ()) if not wait.result.done()]
                if waits:
                    return waits
            self._running = False
            return []

    def _read(self, waits: list[JobWait]) -> None:
        with session_scope() as session:
            states = jobs.list_states(session, {wait.job_id for wait in waits})
            over = [wait for wait in waits if wait.job_id not in states or wait.is_over(*states[wait.job_id])]
            ended = {wait.job_id for wait in over if wait.job_id in states and states[wait.job_id][0].is_final}
            rows = jobs.list_by_id(session, ended) if ended else []
            results = {view.id: view for view in views.jobs(session, rows)}
        for wait in over:
            wait.end(results.get(wait.job_id))


@process_singleton
def job_reader() -> JobReader:
    return JobReader()
