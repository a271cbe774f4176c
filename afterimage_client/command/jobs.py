"""`afterimage jobs`: list, show, wait, cancel, retry."""

from itertools import islice
from pathlib import Path

import click

from afterimage_client.command.generate import wait_and_save
from afterimage_client.command.output import Context, ExitCode, table, with_service
from shared.contracts.jobs import JobState, JobView

PROMPT_CHARS = 60


@click.group()
def jobs() -> None:
    """List, show, wait for and cancel your jobs."""


@jobs.command("list")
@click.option("--state", type=click.Choice([state.value for state in JobState]))
@click.option("-n", "--limit", default=20, show_default=True, help="Largest number of jobs.")
@with_service
def list_jobs(context: Context, *, state: str | None, limit: int) -> int:
    """List your jobs, newest first."""
    found = islice(
        context.service.jobs.list(state=JobState(state) if state else None, page_size=min(limit, 100)), limit
    )
    rows = []
    for job in found:
        if context.as_json:
            context.result(job)
        rows.append([job.id, job.state.value, f"{job.created_at:%Y-%m-%d %H:%M}Z", job.prompt[:PROMPT_CHARS]])
    if not context.as_json:
        context.result({}, *(table(rows) if rows else ["no jobs"]))
    return ExitCode.DONE


@jobs.command()
@click.argument("job_id")
@with_service
def show(context: Context, *, job_id: str) -> int:
    """Show a job, its references and its outputs."""
    job = context.service.jobs.get(job_id)
    context.result(job, *describe(job))
    return ExitCode.DONE


@jobs.command()
@click.argument("job_id")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to save its images in, or one file.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Longest wait; the job then continues.")
@with_service
def wait(context: Context, *, job_id: str, out: Path | None, timeout: float | None) -> int:
    """Wait until a job has ended, and save its images with --out."""
    job = context.service.jobs.get(job_id)
    return wait_and_save(context, job, out, timeout_s=timeout)


@jobs.command()
@click.argument("job_id")
@with_service
def cancel(context: Context, *, job_id: str) -> int:
    """Cancel a job."""
    job = context.service.jobs.cancel(job_id)
    context.result(job, f"{job.id} {job.state.value}")
    return ExitCode.DONE


@jobs.command()
@click.argument("job_id")
@with_service
def retry(context: Context, *, job_id: str) -> int:
    """Create a new job from one that ended without success, and print its id."""
    job = context.service.jobs.retry(job_id)
    context.result(job, str(job.id))
    return ExitCode.DONE


def describe(job: JobView) -> list[str]:
    """Return the lines that people see of a job."""
    rows: list[list[object]] = [
        ["id", job.id],
        ["state", job.state.value],
        ["prompt", job.prompt],
        ["model", job.model],
        ["created", job.created_at.isoformat(timespec="seconds")],
    ]
    if job.queue_position is not None:
        rows.append(["place", f"{job.queue_position} jobs are ahead"])
    if job.error is not None:
        rows.append(["error", f"{job.error.code}: {job.error.detail}"])
    resolution = job.resolution or {}
    if resolution:
        rows.append(["mode", f"{resolution.get('mode')}: {resolution.get('reason')}"])
    for reference in resolution.get("references", []):
        used = f"weight {reference['weight']:.2f}" if reference.get("used") else "not used"
        rows.append(["reference", f"{reference['image_id']}  {used}  {reference.get('caption') or ''}"])
    rows += [["output", f"{each.id}  seed {each.seed}  {each.width}x{each.height}"] for each in job.outputs]
    return table(rows)
