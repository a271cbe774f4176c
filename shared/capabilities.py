"""Checks requests against a model's declared capabilities, and chooses the mode. It needs neither model nor torch.

The API refuses a request at submit if the model cannot run it. The worker uses the same functions.
"""

from collections.abc import Iterable, Mapping
from math import sqrt

from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities, ModelDefaults
from shared.errors import NoReferenceError, UnsupportedModeError, UnsupportedParameterError
from shared.settings import GeneratorDefaults

MAX_AREA_RATIO = 2.0
MIN_AREA_RATIO = 0.5
MAX_ASPECT_RATIO = 3.0
"""The sizes at which a model that draws any size is still trusted, relative to its native area. Beyond twice the area
of its training, a latent diffusion model repeats its subject. Far below that area, the picture falls apart."""


def drawable_size(capabilities: Capabilities, width: int, height: int) -> tuple[int, int]:
    """The (width, height) in pixels that the model should draw for a picture of `width` x `height`.

    It is the requested size where the model draws that well. Otherwise the picture is cropped and scaled afterwards:
    see `worker_service.models.generation.framing`. A model that draws any size then gets a trusted area with about the
    same aspect ratio. Any other model gets its native size.
    """
    native = (capabilities.native_width, capabilities.native_height)
    if not capabilities.any_size:
        return native
    native_area = native[0] * native[1]
    area = min(max(width * height, MIN_AREA_RATIO * native_area), MAX_AREA_RATIO * native_area)
    aspect = min(max(width / height, 1 / MAX_ASPECT_RATIO), MAX_ASPECT_RATIO)
    multiple = capabilities.size_multiple
    return nearest_multiple(sqrt(area * aspect), multiple), nearest_multiple(sqrt(area / aspect), multiple)


def nearest_multiple(length: float, multiple: int) -> int:
    """The multiple that is nearest to a length, at least one."""
    return max(1, round(length / multiple)) * multiple


UNKNOWN_MODEL = {"width": 512, "height": 512, "num_inference_steps": 30, "guidance_scale": 7.5}
"""Values for fields that neither the request nor the settings set, until a worker has published those of the model."""


def resolve_defaults(settings: GeneratorDefaults, model: Capabilities | Mapping[str, float] | None) -> ModelDefaults:
    """The values of the settings, and for unset ones those of the model.

    model: its published capabilities, or its own values by name; None if they are not known.
    """
    if isinstance(model, Capabilities):
        model = model.defaults.model_dump() if model.defaults else None
    return ModelDefaults.model_validate({**(model or UNKNOWN_MODEL), **settings.model_dump(exclude_none=True)})


MOST_READ_REFERENCES = 3
"""References that mode `reference` searches, unless the request says how many. Models that read pictures draw worse
with more: MultiBanana (arXiv 2511.22989), and the card of Qwen-Image-Edit-2509 ("1 to 3")."""


def default_references(capabilities: Capabilities | None, mode: Mode, *, default: int, concepts: int = 1) -> int:
    """How many references are searched for a request that does not say.

    capabilities: None if no worker has published them. default: the number for the other modes. concepts: the number
    of references that the concepts need.
    """
    reads = mode is Mode.REFERENCE
    if mode is Mode.AUTO and capabilities is not None:
        reads = supports(capabilities, Mode.REFERENCE) and not supports(capabilities, Mode.IMAGE_PROMPT)
    return max(min(default, MOST_READ_REFERENCES) if reads else default, concepts)


def supports(capabilities: Capabilities, mode: Mode) -> bool:
    """Whether the model can work in this mode; always True for `auto`."""
    return mode is Mode.AUTO or mode.value in capabilities.modes


def check_parameters(
    capabilities: Capabilities,
    *,
    mode: Mode = Mode.AUTO,
    scheduler: str | None = None,
    loras: Iterable[str] = (),
    references: int = 0,
    negative_prompt: str | None = None,
) -> None:
    """Refuse a request that the model cannot run.

    references: how many are pinned.

    Raises:
        NoReferenceError: `mode` is `none`, and the model only edits pictures.
        UnsupportedModeError: the model does not support `mode`.
        UnsupportedParameterError: the model has no such scheduler or LoRA, it takes fewer references, or it takes no
            negative prompt.
    """
    if mode is Mode.NONE and capabilities.needs_reference:
        raise NoReferenceError(mode=mode.value, modes=capabilities.modes)
    if not supports(capabilities, mode):
        raise UnsupportedModeError(
            f"This model cannot work in mode {mode.value!r}; it can in {', '.join(capabilities.modes)}.",
            mode=mode.value,
            modes=capabilities.modes,
        )
    if scheduler is not None and scheduler not in capabilities.schedulers:
        raise UnsupportedParameterError(
            f"This model has no scheduler {scheduler!r}; it has {', '.join(capabilities.schedulers)}.",
            parameter="scheduler",
            choices=capabilities.schedulers,
        )
    unknown = sorted(set(loras) - set(capabilities.loras))
    if unknown:
        known = ", ".join(capabilities.loras) or "none"
        raise UnsupportedParameterError(
            f"This model has no LoRA {', '.join(map(repr, unknown))}; it has {known}.",
            parameter="loras",
            choices=capabilities.loras,
        )
    if references > capabilities.max_references:
        raise UnsupportedParameterError(
            f"This model takes at most {capabilities.max_references} references, not {references}.",
            parameter="reference_ids",
            maximum=capabilities.max_references,
        )
    if negative_prompt and not capabilities.supports_negative_prompt:
        raise UnsupportedParameterError("This model takes no negative prompt.", parameter="negative_prompt")


def resolve_mode(
    capabilities: Capabilities, mode: Mode, *, references: int, captions: int | None = None, pinned: bool = False
) -> tuple[Mode, str]:
    """The mode to work in, never `auto`, and a sentence with the reason.

    references: how many are relevant enough, or pinned. captions: how many of these have a caption; None if unknown.
    pinned: whether the request named the references.

    Raises:
        UnsupportedModeError: the model does not support the explicit `mode`.
        NoReferenceError: the model only edits pictures, and there is no reference.
    """
    check_parameters(capabilities, mode=mode)
    if references == 0 and capabilities.needs_reference:
        raise NoReferenceError(modes=capabilities.modes)
    given = "the request pinned references" if pinned else "relevant references were found"
    if mode is Mode.NONE:
        return Mode.NONE, "The request asked for no references."
    if references == 0:
        return Mode.NONE, "No relevant reference was found, so only the prompt is used."
    if mode is not Mode.AUTO:
        return mode, "The request asked for this mode."
    if supports(capabilities, Mode.IMAGE_PROMPT):
        return Mode.IMAGE_PROMPT, f"The model takes image prompts, and {given}."
    if supports(capabilities, Mode.REFERENCE):
        return Mode.REFERENCE, f"The model takes several reference images, and {given}."
    if not supports(capabilities, Mode.CAPTION):
        return Mode.NONE, "The model takes neither image prompts nor captions, so only the prompt is used."
    if captions == 0:
        return Mode.NONE, "The model takes no image prompts, and no chosen reference has a caption."
    return Mode.CAPTION, "The model takes no image prompts, so the captions of the references are used."
