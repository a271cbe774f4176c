"""What `celery -A ops.flower.app flower` opens: the product's Celery configuration, without its tasks.

An entry point: nothing else imports it, because it reads the settings when it is imported. Flower needs no task code:
it shows the events that workers send.
"""

from shared.messaging.queue import celery_app

app = celery_app()
