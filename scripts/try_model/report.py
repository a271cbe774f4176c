"""The report about one generator, and its JSON form."""

from enum import StrEnum
from typing import Any

from pydantic import Field

from shared.contracts.common import Contract
from shared.contracts.service import Capabilities, ModelDefaults


class Outcome(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    SKIPPED = "skipped"


class Check(Contract):
    """One promise of the service, checked on this model and this device."""

    name: str
    mode: str | None = Field(description="mode of the request; `null`: the check concerns no single mode")
    outcome: Outcome
    detail: str = Field(description="what was seen, or why the check was skipped")
    difference: float | None = Field(
        None, description="largest difference of a channel of a pixel, in [0, 1]; `null`: no images were compared"
    )
    tolerance: float | None = Field(None, description="differences up to this one count as rounding")


class Measurement(Contract):
    """Calls of one size, after a first call that is not timed."""

    images: int = Field(description="images per call")
    references: int = Field(description="references per image")
    mode: str
    out_of_memory: bool = Field(False, description="the call did not fit, even with every memory saver")
    seconds_per_image: float | None = Field(None, description="median of the timed calls; `null`: out of memory")
    peak_bytes: int | None = Field(
        None, description="most memory in use during these calls; `null`: this machine does not measure it"
    )
    memory_savers: list[str] = Field(default_factory=list, description="used because the call did not fit without")


class Previews(Contract):
    available: bool
    detail: str = Field(description="size of a preview, or why the model shows no previews")


class ComparedImage(Contract):
    """One request, drawn by both generators."""

    mode: str
    psnr_db: float | None = Field(description="peak signal-to-noise ratio; `null`: identical")
    difference: float = Field(description="largest difference of a channel of a pixel, in [0, 1]")
    same: bool = Field(description="the difference counts as rounding noise, as in a replay: 40 dB or more")


class Comparison(Contract):
    """Another generator of the settings, with the same requests."""

    model: str
    pipeline: str
    dtype: str
    load_s: float
    rest_bytes: int | None
    measurement: Measurement = Field(description="of one image, without references where the model allows it")
    images: list[ComparedImage]


class TryReport(Contract):
    """All that was found about one generator."""

    model: str
    version: str = Field(description="of Afterimage")
    device_name: str
    device_bytes: int | None = Field(description="memory of the GPU; `null` on a CPU")
    capabilities: Capabilities
    defaults: ModelDefaults
    probe: list[str] = Field(description="verdict of the probe at start, in sentences")
    reference_call: dict[str, Any] | None = Field(description="how the pipeline reads references in mode `reference`")
    previews: Previews
    load_s: float = Field(description="seconds to load the weights")
    warm_up_s: float = Field(description="seconds for the first image and the probe")
    rest_bytes: int | None = Field(
        description="memory in use between two calls: of the GPU, or of the process on a CPU; `null`: not measured"
    )
    width: int = Field(description="pixels of the measured images")
    height: int
    num_inference_steps: int
    measurements: list[Measurement]
    largest_batch_that_pays: int | None = Field(description="images per call; `null`: not even one image fits")
    checks: list[Check]
    promises_checked: bool = Field(True, description="`false`: only whether each mode draws was checked")
    passed: bool = Field(description="no check failed, and every comparison was possible")
    sheet: str | None = Field(description="file with one row of images per mode")
    comparisons: list[Comparison] = Field(default_factory=list, description="with the other generators, as named")
    comparison_errors: dict[str, str] = Field(
        default_factory=dict, description="why a generator could not be compared, by its name"
    )
    settings: dict[str, Any] = Field(description="the generator's settings, with the values that were found")
