"""Settings of engines: servers that run already, and draw the images of a generator of kind `openai`."""

from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, field_validator

from shared.settings.section import Advanced, Section
from shared.settings.servers import http_url

Parameter = Literal["seed", "num_inference_steps", "guidance_scale", "negative_prompt", "response_format"]
"""A parameter of a call that servers name in different ways, or do not take."""
PARAMETERS: tuple[Parameter, ...] = get_args(Parameter)


def _base_url(url: str) -> str:
    if urlsplit(http_url(url)).query or "#" in url:
        raise ValueError("must end with the path below which the engine has images/generations, such as /v1")
    return url.rstrip("/")


class EngineSettings(Section):
    """The engines of one generator: servers with OpenAI's image calls that all serve the same model."""

    urls: Advanced[list[Annotated[str, AfterValidator(_base_url)]]] = Field(
        min_length=1,
        max_length=64,
        description="base URLs such as `http://127.0.0.1:30010/v1`, one per engine; an image goes to the engine with "
        "the fewest images in flight",
    )
    model: Advanced[str] = Field(min_length=1, description="name that the engines have for the model")
    api_key: Advanced[SecretStr | None] = Field(None, description="key for the engines; unset: none is sent")
    modes: Advanced[list[Literal["none", "caption", "reference"]]] = Field(
        ["none", "caption"],
        min_length=1,
        description="ways to use references; `reference` sends the pictures to `images/edits`; without `none`, the "
        "model only edits pictures",
    )
    concurrency: Advanced[int] = Field(
        2, ge=1, le=64, description="images in flight at each engine; with 2, an engine has the next image at once"
    )
    timeout_s: Advanced[float] = Field(
        300, gt=0, le=3600, description="longest wait for one image; at the start also for the first engine to answer"
    )
    connect_timeout_s: Advanced[float] = Field(5, gt=0, le=60, description="longest wait for a connection")
    size_multiple: Advanced[int] = Field(16, ge=1, le=512, description="width and height are multiples of this")
    fields: Advanced[dict[Parameter, str]] = Field(
        default_factory=lambda: {name: name for name in PARAMETERS},
        validate_default=True,
        description='the engines\' names of these fields, such as `guidance_scale = "true_cfg_scale"`; an empty name: '
        "the field is not sent; fields that are left out keep their name",
    )
    extra: Advanced[dict[str, Any]] = Field(
        default_factory=dict, description="more fields of every call, with their values"
    )
    image_field: Advanced[Literal["image", "image[]"]] = Field(
        "image", description="field of `images/edits` that is repeated for each picture; OpenAI's own is `image[]`"
    )
    digest: Advanced[str | None] = Field(
        None,
        pattern=r"^[A-Za-z0-9:._-]{1,200}$",
        description="digest of the weights as you state it, for the record of each image; unset: one of `model` and "
        "`revision`",
    )

    @field_validator("fields")
    @classmethod
    def _unnamed_fields_keep_their_name(cls, fields: dict[Parameter, str]) -> dict[Parameter, str]:
        return {name: fields.get(name, name) for name in PARAMETERS}
