"""Messages come twice, or come from other programs."""

import threading
import time

from celery import Celery
from pydantic import SecretStr

from shared.contracts.jobs import Lane
from shared.messaging import queue
from shared.settings import QueueSettings
from tests.chaos.scene import BURST, PATIENCE_S, Hit, Scene
from tests.foreign_broker import FOREIGN
from tests.stack import wait_until


def deliver_twice(scene: Scene) -> Hit:
    """Send every message of some jobs again and again for 5 s, also after the jobs have started or ended."""
    app = queue.configure(
        Celery("chaos"), QueueSettings(url=SecretStr(scene.stack.environment()["AFTERIMAGE_QUEUE__URL"]))
    )
    submitted = scene.load.jobs(BURST * 2)
    until = time.monotonic() + 5
    try:
        while time.monotonic() < until:
            for each in submitted:
                for job_id in each.ids:
                    app.send_task(
                        queue.GENERATE,
                        args=[str(job_id)],
                        task_id=str(job_id),
                        queue=queue.generate_queue(each.body["model"]),
                        priority=Lane(each.body["lane"]).rank,
                    )
            app.send_task(queue.EMBED_PENDING, queue=queue.EMBED_IMAGES_QUEUE)
            app.send_task(queue.DELIVER_WEBHOOKS, queue=queue.IO_QUEUE)
            threading.Event().wait(0.3)
    finally:
        app.close()
    return Hit(jobs=scene.unfinished())


def foreign_messages(scene: Scene) -> Hit:
    """Write messages of other programs to every list. They must be dropped, and end no process."""
    before = scene.pids()
    scene.load.jobs(BURST)
    with scene.broker() as broker:
        for name in scene.lists():
            broker.lpush(name, *FOREIGN)
        broker.hset("unacked", "foreign", FOREIGN[0])
        broker.zadd("unacked_index", {"foreign": 1})
        broker.publish("/0.celery.pidbox", FOREIGN[0])
    scene.load.jobs(BURST)
    scene.load.upload(2)
    scene.load.wait_until_sent()
    hit = Hit(jobs=scene.unfinished())
    wait_until(lambda: not _foreign_left(scene), timeout_s=PATIENCE_S, what="foreign messages to be dropped")
    assert scene.pids() == before, "a foreign message ended a process"
    return hit


def _foreign_left(scene: Scene) -> bool:
    with scene.broker() as broker:
        listed = (each for name in scene.lists() for each in broker.lrange(name, 0, -1))
        return bool(broker.hexists("unacked", "foreign")) or any(each in FOREIGN for each in listed)
