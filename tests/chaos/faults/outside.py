"""The blob store, an API process whose encoder writes other bytes, clients, and webhook receivers."""

import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
from sqlalchemy import or_, select

from ops.local.layout import free_port
from ops.local.stack import REPOSITORY
from shared.db.tables import WebhookDelivery
from tests.chaos.scene import BURST, PATIENCE_S, Hit, Scene
from tests.stack import clean_environment, wait_until


def full_store(scene: Scene) -> Hit:
    with scene.store.full():
        since = time.time()
        scene.load.jobs(BURST)
        scene.load.upload(2)
        wait_until(lambda: scene.were_sent_back(since), timeout_s=PATIENCE_S, what="a job to meet the full store")
    return Hit(jobs=scene.unfinished())


def hang_receivers(scene: Scene) -> Hit:
    """Let receivers accept every delivery and never answer. Jobs still have to run."""
    hit = Hit()
    scene.receiver.answers.clear()
    try:
        scene.load.jobs(BURST)
        wait_until(scene.leased_deliveries, timeout_s=PATIENCE_S, what="deliveries that hang")
        hit.jobs = scene.unfinished()
        threading.Event().wait(scene.webhook_timeout_s + 1)
    finally:
        scene.receiver.answers.set()
    deliveries = scene.pending_deliveries()
    scene.redeliver(deliveries)
    hit.also = lambda: scene.are_delivered(deliveries)
    return hit


def drip_receivers(scene: Scene) -> Hit:
    """Let receivers answer one byte at a time, without end. Each delivery has to end at its time limit."""
    hit = Hit()
    with scene.receiver.dripping():
        scene.load.jobs(BURST)
        wait_until(scene.leased_deliveries, timeout_s=PATIENCE_S, what="deliveries that drip")
        dripping = scene.leased_deliveries()
        ended = select(WebhookDelivery.id).where(
            WebhookDelivery.id.in_(dripping),
            # A delivery that began before may have succeeded.
            or_(WebhookDelivery.state == "delivered", WebhookDelivery.last_error == "TimeoutError"),
        )
        wait_until(
            lambda: len(scene.rows(ended)) == len(dripping),
            timeout_s=scene.webhook_timeout_s * 2 + PATIENCE_S,
            what="dripping deliveries to end at their time limit",
        )
        hit.jobs = scene.unfinished()
    deliveries = scene.pending_deliveries()
    scene.redeliver(deliveries)
    hit.also = lambda: scene.are_delivered(deliveries)
    return hit


def other_encoder(scene: Scene) -> Hit:
    """Upload old and new images also through an API process of another release, which encodes to other bytes."""
    port = free_port(excluding=set())
    environment = clean_environment() | scene.stack.environment() | {"AFTERIMAGE_API__PORT": str(port)}
    command = [sys.executable, "-m", "tests.other_encoder"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: scene.is_ready(url), timeout_s=PATIENCE_S, what="the other API process to be ready")
            for _ in range(BURST):
                scene.load.upload_again(scene.an_upload()[0], api=url)
            scene.load.upload(BURST, apis=[url, scene.stack.url])
            scene.load.wait_until_sent()
        finally:
            process.terminate()
    uploaded = scene.pending_images()
    return Hit(also=lambda: scene.are_embedded(uploaded))


def flood(scene: Scene) -> Hit:
    """Let one owner send far more than the limits of its key. Only its own requests may be refused."""
    headers = {"Authorization": f"Bearer {scene.stack.new_key('dave', 'generate')}"}
    url, body = f"{scene.stack.url}/api/v1/generate", {"prompt": "a flood", "dry_run": True}
    with ThreadPoolExecutor(16) as pool:
        sent = [pool.submit(httpx.post, url, json=body, headers=headers, timeout=PATIENCE_S) for _ in range(300)]
        scene.load.jobs(BURST)
        answers = [each.result() for each in sent]
    scene.load.wait_until_sent()
    refused = [answer for answer in answers if answer.status_code == httpx.codes.TOO_MANY_REQUESTS]
    scene.load.refused.update(answer.json()["code"] for answer in refused)
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {httpx.codes.OK, httpx.codes.TOO_MANY_REQUESTS}, f"requests got {statuses}"
    return Hit(jobs=scene.unfinished())
