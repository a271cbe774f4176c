"""The gauges behind the alerts, on real servers."""

import shutil
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from ops.local.stack import LocalStack
from shared.contracts.jobs import JobState
from shared.db import webhooks
from shared.db.tables import WebhookDelivery
from shared.settings import Settings
from shared.storage import get_blobs, local_folder
from tests.integration.test_webhooks import ended_job
from worker_service.maintenance.watch_components import ComponentWatch


def up() -> dict[str, float | None]:
    names = ("database", "broker", "cache", "storage")
    return {name: REGISTRY.get_sample_value("component_up", {"component": name}) for name in names}


@pytest.fixture
def watch(settings: Settings) -> ComponentWatch:
    return ComponentWatch(settings)


def test_every_server_that_works_is_up_and_the_free_disk_is_known(watch: ComponentWatch, settings: Settings) -> None:
    watch.update()
    assert set(up().values()) == {1}
    free, size = (REGISTRY.get_sample_value(f"storage_{name}_bytes") for name in ("free", "size"))
    assert size == shutil.disk_usage(local_folder(settings.storage.url)).total
    assert free is not None
    assert 0 < free < size


@pytest.mark.parametrize(("process", "component"), [("queue", "broker"), ("cache", "cache")])
def test_a_server_that_is_frozen_is_down_alone(
    watch: ComponentWatch, servers: LocalStack, process: str, component: str
) -> None:
    servers.control.freeze(process)
    try:
        watch.update()
        assert {name for name, value in up().items() if value == 0} == {component}
    finally:
        servers.control.thaw(process)
    watch.update()
    assert set(up().values()) == {1}


def test_a_blob_store_without_its_folder_is_down(watch: ComponentWatch, settings: Settings, tmp_path: Path) -> None:
    get_blobs()  # makes the folder
    folder = local_folder(settings.storage.url)
    moved = folder.rename(tmp_path / "moved")
    try:
        watch.update()
        assert up()["storage"] == 0
    finally:
        moved.rename(folder)


def test_only_webhooks_that_are_due_for_long_are_overdue(session: Session) -> None:
    ended_job(session, "https://example.com/hook")
    assert webhooks.count_overdue(session) == 0
    session.execute(update(WebhookDelivery).values(due_at=func.now() - func.make_interval(0, 0, 0, 0, 0, 6)))
    assert webhooks.count_overdue(session) == 1
    session.execute(update(WebhookDelivery).values(state="delivered"))
    assert webhooks.count_overdue(session) == 0


def test_the_series_of_every_final_state_exists_before_the_first_job_ends() -> None:
    for state in JobState:
        assert (REGISTRY.get_sample_value("jobs_finished_total", {"state": state.value}) is not None) == state.is_final
