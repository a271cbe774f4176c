"""How the approximate index of an embedding space is searched."""

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from shared.contracts.common import Contract


class IndexKind(StrEnum):
    """The content of a space's HNSW index."""

    HALFVEC = "halfvec"
    """Cosines of the stored vectors, two bytes per component."""
    BIT = "bit"
    """Signs of the components, one bit each. The vectors then decide among the images found so."""


class TunedSearch(Contract):
    """The smallest values of `ef_search` at which searches for up to `k` images reached the wanted recall."""

    k: int
    ef_search: int = Field(description="without a filter")
    recall: float = Field(description="share of the true `k` nearest images that were found; the lower of two figures")
    recall_all: float = Field(description="without a filter")
    recall_filtered: float = Field(description="with a filter that lets a tenth of the images through")
    median_ms: float = Field(description="of a search without a filter, as measured")
    # Missing in rows that the previous release has written: its one value was for both.
    ef_search_filtered: int | None = Field(None, description="with the filter; `null`: `ef_search`")
    median_ms_filtered: float | None = Field(None, description="of a search with the filter, as measured")


class SearchTuning(Contract):
    """The result of `tune-search`."""

    target: float = Field(description="wanted recall")
    index_kind: IndexKind
    vectors: int = Field(description="vectors of the space at that time")
    queries: int
    measured_at: datetime
    searches: list[TunedSearch] = Field(description="by rising `k`")

    def ef_search(self, k: int, *, filtered: bool) -> int:
        """The measured `ef_search` for `k` images, that of the next larger `k`, or the largest one."""
        tuned = next((each for each in self.searches if each.k >= k), self.searches[-1])
        return (tuned.ef_search_filtered if filtered else None) or tuned.ef_search
