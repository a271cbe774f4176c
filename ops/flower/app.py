"""Entry point of `celery -A ops.flower.app flower`: the Celery configuration of the product, without its tasks.

Other modules must not import it, because the import reads the settings. Flower needs no task code: it shows the events
that workers send.
"""

from flower.views.monitor import Metrics  # type: ignore[import-untyped]
from tornado.web import authenticated

from shared.messaging.queue import celery_app

# Flower asks for its password everywhere but at `/healthcheck`, which says only `OK`, and here. Its metrics name tasks
# and workers.
Metrics.get = authenticated(Metrics.get)

app = celery_app()
