"""Daily quotas: images per owner and day (UTC). They count at submit and are given back if the job does not succeed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from uuid import UUID

from sqlalchemy import Uuid, bindparam, func, select, text, update
from sqlalchemy.orm import Session

from shared.db.tables import ImageUsage, Job, Owner
from shared.errors import QuotaExceededError
from shared.settings import LimitSettings


@dataclass(frozen=True)
class DailyUsage:
    """The images that an owner has used on one day. quota: images per day; None for no limit."""

    day: date
    images: int
    quota: int | None

    @property
    def ends_at(self) -> datetime:
        return datetime.combine(self.day + timedelta(days=1), time(), UTC)


RESERVATION = """
    quota as (select nullif(coalesce(daily_images, :daily_images), 0) as images from owners where id = :owner_id),
    reservation as (
        insert into image_usage as used (owner_id, day, images)
        select :owner_id, current_date, :images from quota where quota.images is null or :images <= quota.images
        on conflict (owner_id, day) do update set images = used.images + excluded.images
            where (select quota.images is null or used.images + excluded.images <= quota.images from quota)
        returning day
    )
"""
"""Parts of a WITH: they count `images` towards today's quota. `reservation` has no row when they exceed the quota."""
RESERVE = text(f"with {RESERVATION} select day from reservation").bindparams(bindparam("owner_id", type_=Uuid))


def reserve(session: Session, owner_id: UUID, images: int, settings: LimitSettings) -> date:
    """Count images towards the owner's quota of today; return the day, for `Job.quota_day`.

    Other transactions of the owner wait here until this one ends, so that together they cannot exceed the quota.

    Raises:
        QuotaExceededError: the images exceed the quota. Its `retry_after_s` ends with the day.
    """
    values = {"owner_id": owner_id, "images": images, "daily_images": settings.daily_images}
    counted: date | None = session.scalar(RESERVE, values)
    if counted is None:
        raise exceeded(session, owner_id, images, settings)
    return counted


def exceeded(session: Session, owner_id: UUID, images: int, settings: LimitSettings) -> QuotaExceededError:
    """The error of images that exceed the owner's quota of today."""
    today = get_today(session, owner_id, settings)
    left_s = max(1, round((today.ends_at - datetime.now(UTC)).total_seconds()))
    return QuotaExceededError(quota=today.quota, used=today.images, asked=images, retry_after_s=left_s)


def give_back(session: Session, job_ids: Sequence[UUID]) -> None:
    """Give the images of jobs that ended without success back to their owners' quotas."""
    reserved = (
        select(Job.owner_id, Job.quota_day, func.sum(Job.images).label("images"))
        .where(Job.id.in_(job_ids), Job.quota_day.is_not(None))
        .group_by(Job.owner_id, Job.quota_day)
        .order_by(Job.owner_id, Job.quota_day)  # one order everywhere, so that two transactions cannot deadlock
    )
    for row in session.execute(reserved).all():
        give_back_images(session, row.owner_id, row.quota_day, row.images)


def give_back_images(session: Session, owner_id: UUID, day: date, images: int) -> None:
    """Give images back that were reserved on `day` and will not be generated."""
    session.execute(
        update(ImageUsage)
        .where(ImageUsage.owner_id == owner_id, ImageUsage.day == day)
        .values(images=func.greatest(ImageUsage.images - images, 0))
    )


def get_today(session: Session, owner_id: UUID, settings: LimitSettings) -> DailyUsage:
    """The owner's usage and quota of today."""
    day = session.scalars(select(func.current_date())).one()
    used = select(ImageUsage.images).where(ImageUsage.owner_id == owner_id, ImageUsage.day == day)
    return DailyUsage(day=day, images=session.scalar(used) or 0, quota=_quota(session, owner_id, settings))


def _quota(session: Session, owner_id: UUID, settings: LimitSettings) -> int | None:
    own = session.scalar(select(Owner.daily_images).where(Owner.id == owner_id))
    return (settings.daily_images if own is None else own) or None
