"""Jobs that crashed their worker too often."""

import argparse
from uuid import UUID

from rich.console import Console
from rich.table import Table
from sqlalchemy.orm import Session

from scripts.admin.records import Commands
from shared.contracts.jobs import JobState
from shared.db import jobs
from shared.db.session import session_scope
from shared.db.tables import Job
from shared.errors import ResourceNotFoundError
from shared.messaging import queue

MAX_REQUEUED_JOBS = 10_000


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("dead-jobs", help="list jobs that crashed their worker too often, latest first")
    command.add_argument("--limit", type=int, default=50)
    command.set_defaults(run=_list)
    command = commands.add_parser("requeue", help="retry dead jobs, each as a new job; prints the new ids")
    command.add_argument("job_ids", type=UUID, nargs="*", metavar="JOB_ID")
    command.add_argument("--all", action="store_true", help="every dead job that was not retried yet")
    command.set_defaults(run=_requeue)


def _list(arguments: argparse.Namespace) -> None:
    table = Table("id", "owner", "model", "ended", "crashes", "retried", "prompt")
    with session_scope() as session:
        for each in jobs.list_dead(session, limit=arguments.limit):
            job, ended = each.job, each.job.finished_at
            moment = f"{ended:%Y-%m-%d %H:%M}" if ended else ""
            again = "yes" if each.retried else ""
            prompt = job.parameters["prompt"][:60]
            table.add_row(str(job.id), each.owner, job.model, moment, str(job.crashes), again, prompt)
    Console().print(table)


def _requeue(arguments: argparse.Namespace) -> None:
    if arguments.all == bool(arguments.job_ids):
        raise ValueError("give job ids or --all, not both")
    with session_scope() as session:
        old = [_get(session, job_id) for job_id in arguments.job_ids]
        if arguments.all:
            old = [each.job for each in jobs.list_dead(session, limit=MAX_REQUEUED_JOBS) if not each.retried]
        new = [jobs.insert_retry(session, job) for job in old]
    # After the commit. The reconciler dispatches jobs that the broker does not accept now.
    for model in {job.model for job in new}:
        queue.dispatch_jobs(model)
    for job in new:
        print(job.id)


def _get(session: Session, job_id: UUID) -> Job:
    job = session.get(Job, job_id)
    if job is None or job.state != JobState.DEAD:
        raise ResourceNotFoundError(f"There is no dead job {job_id}.")
    return job
