"""Settings of the search for references: its defaults, and the split of a prompt into concepts."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from shared.settings.section import ADVANCED, Advanced, Section
from shared.settings.servers import http_url


class RetrievalSettings(Section):
    default_k: int = Field(4, ge=1, le=16, description="number of references of a request that does not set it")
    min_similarity: Advanced[float | None] = Field(
        None,
        ge=-1,
        le=1,
        description="lowest cosine of a reference that is used; empty: the thresholds that `scripts.calibrate` "
        "measured for the CLIP, or 0.42 without them",
    )
    duplicate_similarity: Advanced[float] = Field(
        0.95,
        ge=0,
        le=1,
        description="lowest cosine at which two references count as duplicates; "
        "0.05 less if their perceptual hashes are nearly equal",
    )
    weight_temperature: Advanced[float] = Field(
        0.1, gt=0, le=10, description="temperature of the softmax that turns similarities into weights"
    )
    ef_search: Advanced[int | None] = Field(
        None,
        ge=10,
        le=1000,
        description="candidates that the vector index examines; more give better results and take longer; unset: as "
        "`python -m scripts.admin tune-search` measured; before that 100, and searches among fewer than 100,000 images "
        "are exact",
    )
    exact_below: Advanced[int] = Field(
        10_000, ge=0, description="the search is exact when the filter leaves fewer images than this"
    )
    text_timeout_s: Advanced[float] = Field(
        5, gt=0, le=60, description="longest wait of a search for the vector of its query"
    )
    plan_expires_s: Advanced[int] = Field(
        3600, ge=1, le=2_592_000, description="how long a request may use a plan of references"
    )
    text_language: Advanced[str] = Field(
        "english",
        pattern=r"^[a-z_][a-z0-9_]{0,62}$",
        description="text search configuration of Postgres that finds the words of captions and tags; the first "
        "upgrade applies it, and later changes need `python -m scripts.admin set-text-language`",
    )


class PlannerSettings(Section):
    """An optional chat model that splits prompts into concepts."""

    url: Annotated[Annotated[str, AfterValidator(http_url)] | None, ADVANCED] = Field(
        None,
        description="OpenAI-compatible endpoint that splits prompts into concepts, such as "
        "`http://127.0.0.1:11434/v1`; it gets the prompts; unset: rules split them",
    )
    model: Advanced[str] = Field("", description="name of the chat model at this endpoint; required with `url`")
    api_key: Advanced[SecretStr | None] = Field(None, description="key for this endpoint; unset: none is sent")
    timeout_s: Advanced[float] = Field(
        3, gt=0, le=30, description="longest wait for an answer; then rules split the prompt"
    )
    pause_s: Advanced[float] = Field(
        30, ge=0, le=3600, description="after a failure, rules split all prompts for this long"
    )

    @model_validator(mode="after")
    def _a_model_is_named(self) -> Self:
        if self.url is not None and not self.model:
            raise ValueError("model is required with url")
        return self
