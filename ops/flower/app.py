"""Entry point of `celery -A ops.flower.app flower`: the Celery configuration of the product, without its tasks.

Other modules must not import it, because the import reads the settings. Flower needs no task code: it shows the events
that workers send.
"""

from shared.messaging.queue import celery_app

app = celery_app()
