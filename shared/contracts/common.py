"""Types that requests and responses share."""

import re
import unicodedata
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints


class Contract(BaseModel):
    """A request or response body. Unknown fields are errors, and values do not change after validation."""

    # Responses contain every field, so the OpenAPI document marks all fields of a response as required.
    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_serialization_defaults_required=True)


def _plain_text(text: str) -> str:
    """Return the text with CRLF and CR as a line feed; other control characters are errors."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if any((ord(character) < 32 and character not in "\n\t") or ord(character) == 127 for character in text):
        raise ValueError("must not contain control characters")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise ValueError("must be valid Unicode")
    return text


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _not_a_number(moment: object) -> object:
    # Pydantic reads 0.5 as half a second after the start of 1970, which no client means.
    if isinstance(moment, int | float) or (isinstance(moment, str) and re.fullmatch(r"\s*[\d.eE+-]+\s*", moment)):
        raise ValueError("must be a time as in RFC 3339, such as 2026-01-31T12:00:00Z")
    return moment


def _in_utc(moment: datetime) -> datetime:
    # Postgres reads offsets of up to 16 hours; ISO 8601 allows 24.
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie in the years 1 to 9999 in UTC") from None


Text = Annotated[
    str,
    StringConstraints(strip_whitespace=True),
    AfterValidator(_plain_text),
    Field(json_schema_extra={"pattern": r"^[^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f]*$"}),
]
MatchedText = Annotated[Text, AfterValidator(_composed)]
"""A text that filters compare, in Unicode's form NFC: macOS writes `é` as two characters, other systems as one."""
Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]
"""A point in time, converted to UTC."""
QueryMoment = Annotated[AwareDatetime, BeforeValidator(_not_a_number), AfterValidator(_in_utc)]
"""A `Moment` in a query string. A number is an error there, not seconds since 1970."""
Prompt = Annotated[Text, Field(min_length=1, max_length=2000)]
Tag = Annotated[MatchedText, Field(min_length=1, max_length=64)]
_WithoutRepeats = AfterValidator(lambda tags: list(dict.fromkeys(tags)))
Tags = Annotated[list[Tag], Field(max_length=32), _WithoutRepeats]
"""The tags of an image. Each is kept once."""
FilterTags = Annotated[list[Tag], Field(max_length=16), _WithoutRepeats]
"""The tags that an image must have, all of them."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
CollectionName = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9_-]{0,62}/)?[a-z0-9][a-z0-9_-]{0,62}$")]
"""The name of a collection: of the caller, `shared`, or `owner/name` for one that another owner shares."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Metadata = Annotated[
    dict[Annotated[Text, Field(min_length=1, max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=16),
]


class ImageFormat(StrEnum):
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def media_type(self) -> str:
        return f"image/{self.value}"


class FieldProblem(Contract):
    """One mistake in a request."""

    field: str = Field(description="place of the mistake, such as `body.width` or `query.k`", examples=["body.width"])
    code: str = Field(description="stable code of the mistake", examples=["greater_than_equal"])
    message: str


class OnInvalid(StrEnum):
    """How the service handles a request of many parts when some are invalid."""

    REFUSE = "refuse"
    SKIP = "skip"


class Problem(Contract):
    """The body of every error response, `application/problem+json` (RFC 9457)."""

    type: str = Field(description="the code as a URI", examples=["urn:afterimage:problem:validation_failed"])
    title: str
    status: int = Field(ge=400, le=599)
    code: str = Field(description="stable code to match on", examples=["validation_failed"])
    detail: str
    request_id: str
    errors: list[FieldProblem] = Field(default_factory=list)
    context: dict[str, Any] = Field(default_factory=dict)


Item = TypeVar("Item")


class Page(Contract, Generic[Item]):
    """One page of a list, newest first."""

    items: list[Item]
    next_cursor: str | None = Field(description="pass it as `cursor` for the next page; `null` on the last page")

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        """`JobPage` for a page of `JobView`: the name that generated clients give it."""
        return f"{params[0].__name__.removesuffix('View')}Page"


class PageQuery(Contract):
    limit: int = Field(20, ge=1, le=100)
    cursor: str | None = Field(None, max_length=200)
