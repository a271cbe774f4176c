"""Who is asking."""

from dataclasses import dataclass
from functools import lru_cache
from uuid import UUID

from shared.db import owners
from shared.db.session import session_scope
from shared.settings import get_settings

ALL_SCOPES = frozenset({"generate", "search", "corpus:write", "admin"})


@dataclass(frozen=True)
class Caller:
    """On whose behalf a request acts, and what it may do."""

    owner_id: UUID
    scopes: frozenset[str]


def keyless_caller() -> Caller:
    """The default owner with every right: who acts where API keys are off.

    Raises:
        DatabaseConnectionError
    """
    return Caller(_owner_id(get_settings().security.default_owner), ALL_SCOPES)


@lru_cache(maxsize=8)
def _owner_id(name: str) -> UUID:
    # Remembered for the life of the process: an owner's id never changes and owners are disabled, not deleted.
    with session_scope() as session:
        return owners.ensure(session, name)
