"""The use cases, without HTTP, by the same nouns as `api_service.routes`."""

from api_service.services import (
    admin as admin,
)
from api_service.services import (
    bulk_results as bulk_results,
)
from api_service.services import (
    bulks as bulks,
)
from api_service.services import (
    generation as generation,
)
from api_service.services import (
    health as health,
)
from api_service.services import (
    images as images,
)
from api_service.services import (
    job_stream as job_stream,
)
from api_service.services import (
    jobs as jobs,
)
from api_service.services import (
    outputs as outputs,
)
from api_service.services import (
    search as search,
)
from api_service.services import (
    status as status,
)
from api_service.services import (
    webhooks as webhooks,
)
