"""Checks of every promise of the service after a storm of faults.

They compare the rows, the blobs, the notes of the workers and the receipts of the webhook receiver.
"""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import pairwise
from pathlib import PurePath
from typing import Any
from uuid import UUID

import httpx
from PIL import Image as Picture
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from shared.contracts.common import ImageFormat
from shared.contracts.jobs import JobState
from shared.contracts.safety import SafetyAction
from shared.db import spaces
from shared.db.images import count_without_vector
from shared.db.tables import Image, Job, JobEvent, Output, WebhookSecret
from shared.storage import image_key
from tests.chaos import orders
from tests.chaos.load import Submission
from tests.chaos.receiver import Receipt
from tests.chaos.scene import FINAL, OWNERS, Scene


class Breach(StrEnum):
    LOST = "lost"
    DOUBLED = "doubled"
    STUCK = "stuck"


@dataclass(frozen=True)
class Broken:
    """One promise that was not kept."""

    breach: Breach
    what: str


def broken_so_far(scene: Scene) -> list[Broken]:
    """Return the broken promises that no later work can repair. Work may still be running."""
    with Session(scene.reader) as session:
        # Read jobs before events: an ended job gets no more events.
        ended = {job.id: job for job in session.scalars(select(Job).where(Job.state.in_(FINAL)))}
        events = _events(session)
    generated = (note for note in scene.mailbox.notes(orders.GENERATED) if UUID(note["job_id"]) in ended)
    return [*complete_event_logs(ended, events), *generated_once(generated, ended, events)]


def broken(scene: Scene) -> list[Broken]:
    """Return all broken promises, once all work should have ended."""
    with Session(scene.reader) as session:
        jobs = {job.id: job for job in session.scalars(select(Job))}
        outputs = defaultdict(list)
        for output in session.scalars(select(Output).order_by(Output.index)):
            outputs[output.job_id].append(output)
        events = _events(session)
        images = {image.id: image for image in session.scalars(select(Image))}
        space = spaces.find_active(session)
        unfindable = count_without_vector(session, space) if space is not None else 0
        secrets = list(session.scalars(select(WebhookSecret.secret)))
        leases = session.scalar(select(func.count()).where(Job.lease_until.is_not(None))) or 0
    submissions = scene.load.submissions
    return [
        *one_job_each(submissions, jobs),
        *right_ends(submissions, jobs, outputs),
        *complete_event_logs(jobs, events),
        *([Broken(Breach.STUCK, f"{leases} leases are left")] if leases else []),
        *intact(scene, [(jobs[output.job_id], output) for made in outputs.values() for output in made]),
        *unchanged(scene, [image for image in images.values() if image.state == "ready"]),
        *generated_once(scene.mailbox.notes(orders.GENERATED), jobs, events),
        *uploads_kept(scene.load.uploads, images),
        *([Broken(Breach.LOST, f"{unfindable} images are ready and no search finds them")] if unfindable else []),
        *every_file_named(scene.files(), [*images.values(), *(output for made in outputs.values() for output in made)]),
        *notified_once(submissions, events, scene.receiver.receipts, secrets),
        *(Broken(Breach.STUCK, f"{number} messages are left in {name}") for name, number in scene.messages().items()),
    ]


def _events(session: Session) -> defaultdict[UUID, list[JobEvent]]:
    events = defaultdict(list)
    for event in session.scalars(select(JobEvent).order_by(JobEvent.seq)):
        events[event.job_id].append(event)
    return events


def one_job_each(submissions: Sequence[Submission], jobs: Mapping[UUID, Job]) -> Iterator[Broken]:
    """A request creates one job, however often it is sent. Every answer names that job."""
    made = Counter(job.job_metadata["token"] for job in jobs.values())
    for submission in submissions:
        if len(submission.ids) != 1 or made[submission.token] > 1:
            answers = ", ".join(map(str, submission.ids))
            yield Broken(
                Breach.DOUBLED, f"{submission.token} created {made[submission.token]} jobs; the answers named {answers}"
            )
        for job_id in submission.ids - jobs.keys():
            yield Broken(Breach.LOST, f"job {job_id} was accepted and is gone")


def right_ends(
    submissions: Sequence[Submission], jobs: Mapping[UUID, Job], outputs: Mapping[UUID, list[Output]]
) -> Iterator[Broken]:
    """Every job has ended in an allowed state. A succeeded job has exactly its images, all from its last attempt.

    Images that a content policy withheld are missing, and the job lists them.
    """
    for submission in submissions:
        for job in (jobs[job_id] for job_id in submission.ids & jobs.keys()):
            made = outputs.get(job.id, [])
            if job.state not in FINAL:
                yield Broken(Breach.STUCK, f"job {job.id} is {job.state}, attempt {job.attempt}")
            elif job.state not in submission.ends or (submission.code and (job.error or {})["code"] != submission.code):
                yield Broken(Breach.LOST, f"job {job.id} ended {job.state} ({job.error}), not {[*submission.ends]}")
            decisions = (job.safety or {}).get("decisions", [])
            withheld = {decision["index"] for decision in decisions if decision["action"] == SafetyAction.BLOCK}
            images = range(job.images) if job.state == JobState.SUCCEEDED else range(0)
            wanted = [index for index in images if index not in withheld]
            if [output.index for output in made] != wanted:
                breach = Breach.LOST if len(made) < len(wanted) else Breach.DOUBLED
                yield Broken(breach, f"job {job.id} {job.state} has {len(made)} images, not {len(wanted)}")
            if any(output.blob_key.split("/")[2] != str(job.attempt) for output in made):
                yield Broken(Breach.DOUBLED, f"job {job.id} shows images of another attempt than its last")


def complete_event_logs(jobs: Mapping[UUID, Job], events: Mapping[UUID, list[JobEvent]]) -> Iterator[Broken]:
    """The events of a job are numbered without gaps and have one end. No attempt starts without a reason."""
    for job in jobs.values():
        log = events[job.id]
        if [event.seq for event in log] != list(range(1, job.last_seq + 1)):
            yield Broken(Breach.LOST, f"the event log of job {job.id} has gaps: {[event.seq for event in log]}")
        ends = [event.type for event in log if event.type in FINAL]
        if ends != [job.state] and job.state in FINAL:
            yield Broken(Breach.DOUBLED, f"job {job.id} is {job.state}, and its event log ends with {ends}")
        turns = [event for event in log if event.type in ("queued", "requeued", "started")]
        for before, event in pairwise(turns):
            if event.type == before.type == "started" and event.data["worker"] != orders.THIEF:
                yield Broken(Breach.DOUBLED, f"job {job.id} was started again (seq {event.seq}) while it ran")


def intact(scene: Scene, outputs: Sequence[tuple[Job, Output]]) -> Iterator[Broken]:
    """Every generated image can be downloaded and decoded, and its bytes have the recorded checksum."""

    def problem(job: Job, output: Output) -> str | None:
        content = _content(scene, f"/generations/{output.id}/content", job.owner_id)
        if isinstance(content, str):
            return content
        if hashlib.sha256(content).hexdigest() != output.sha256:
            return "its bytes are not those that were recorded"
        with Picture.open(io.BytesIO(content)) as picture:
            picture.load()
            return None if picture.size == (output.width, output.height) else f"its size is {picture.size}"

    with ThreadPoolExecutor(4) as pool:
        for (_, output), found in zip(outputs, pool.map(lambda each: problem(*each), outputs), strict=True):
            if found:
                yield Broken(Breach.LOST, f"image {output.index} of job {output.job_id}: {found}")


def unchanged(scene: Scene, images: Sequence[Image]) -> Iterator[Broken]:
    """Every image of the corpus can be downloaded, and its bytes are those that its key names."""

    def problem(image: Image) -> str | None:
        content = _content(scene, f"/images/{image.id}/content", scene.owner_ids[OWNERS[0]])
        if isinstance(content, str):
            return content
        key = image_key(image.sha256, ImageFormat(PurePath(image.blob_key).suffix.removeprefix(".")), content)
        return None if key == image.blob_key else "its bytes are not those that its key names"

    with ThreadPoolExecutor(4) as pool:
        for image, found in zip(images, pool.map(problem, images), strict=True):
            if found:
                yield Broken(Breach.LOST, f"image {image.id}: {found}")


def _content(scene: Scene, path: str, owner_id: UUID) -> bytes | str:
    """The bytes of a file, or the problem as text."""
    try:
        answer = httpx.get(f"{scene.stack.url}/api/v1{path}", headers=scene.headers(owner_id), timeout=30)
    except httpx.TransportError as error:  # for instance fewer bytes than announced
        return repr(error)
    return answer.content if answer.is_success else f"{answer.status_code} {answer.text}"


def generated_once(
    notes: Iterable[Mapping[str, Any]], jobs: Mapping[UUID, Job], events: Mapping[UUID, list[JobEvent]]
) -> Iterator[Broken]:
    """An attempt generates each image at most once. Only started attempts generate images.

    A job has as many attempts as it has `started` events.
    """
    generated: defaultdict[UUID, Counter[tuple[int, int]]] = defaultdict(Counter)
    for note in notes:
        generated[UUID(note["job_id"])][note["attempt"], note["index"]] += 1
    for job_id, times in generated.items():
        if job_id not in jobs:
            continue  # `one_job_each` reports a lost job
        for (attempt, index), number in times.items():
            if number > 1:
                yield Broken(
                    Breach.DOUBLED, f"attempt {attempt} at job {job_id} generated image {index} {number} times"
                )
        begun = sum(event.type == "started" for event in events[job_id])
        if jobs[job_id].attempt != begun or max(attempt for attempt, _ in times) > begun:
            yield Broken(Breach.DOUBLED, f"job {job_id}: {begun} attempts began, {sorted(times)} generated images")


def uploads_kept(uploads: Mapping[str, set[UUID]], images: Mapping[UUID, Image]) -> Iterator[Broken]:
    """Every upload has become one image that is searchable or has failed with an error code."""
    for token, ids in uploads.items():
        if len(ids) != 1:
            yield Broken(Breach.DOUBLED, f"{token} became {len(ids)} images")
        for image_id in ids:
            image = images.get(image_id)
            if image is None:
                yield Broken(Breach.LOST, f"image {image_id} was accepted and is gone")
            elif image.state == "pending":
                yield Broken(Breach.STUCK, f"image {image_id} still waits for its vector")
            elif image.state == "failed" and not image.error_code:
                yield Broken(Breach.LOST, f"image {image_id} failed without an error code")


def every_file_named(files: set[str], rows: Sequence[Image | Output]) -> Iterator[Broken]:
    """After a sweep the store contains exactly the blobs that the rows name."""
    named = {key for row in rows for key in (row.blob_key, row.thumbnail_key)}
    for key in sorted(files - named):
        yield Broken(Breach.STUCK, f"no row names the blob {key}")
    for key in sorted(named - files):
        yield Broken(Breach.LOST, f"the blob {key} is gone")


def notified_once(
    submissions: Sequence[Submission],
    events: Mapping[UUID, list[JobEvent]],
    receipts: Sequence[Receipt],
    secrets: Sequence[str],
) -> Iterator[Broken]:
    """Every promised webhook was delivered at least once and signed. All deliveries of an event have one id."""
    ids = defaultdict(set)
    for receipt in receipts:
        ids[receipt.event].add(receipt.webhook_id)
        if not any(_is_signed(receipt, secret) for secret in secrets):
            yield Broken(Breach.LOST, f"delivery {receipt.webhook_id} has no valid signature")
    for delivered, names in ids.items():
        if len(names) > 1:
            yield Broken(Breach.DOUBLED, f"event {delivered} was delivered under {len(names)} ids")
    for submission in submissions:
        for event in (event for job_id in submission.ids for event in events.get(job_id, [])):
            is_promised = event.type in submission.promised_events and event.data.get("worker") != orders.THIEF
            if is_promised and (str(event.job_id), event.seq) not in ids:
                yield Broken(
                    Breach.LOST, f"no receiver was notified that job {event.job_id} {event.type} (seq {event.seq})"
                )


def _is_signed(receipt: Receipt, secret: str) -> bool:
    at = datetime.fromtimestamp(int(receipt.headers["webhook-timestamp"]), UTC)
    signature = Webhook(secret).sign(receipt.webhook_id, at, receipt.body.decode())
    return signature in receipt.headers["webhook-signature"].split()
