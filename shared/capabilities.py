"""What a model can do with a request, answered from its declared capabilities: no model and no torch is needed.

The API refuses at submit what the worker could not do; the worker resolves with the same functions.
"""

from collections.abc import Iterable
from math import sqrt

from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities
from shared.errors import UnsupportedModeError, UnsupportedParameterError

LARGEST_AREA = 2.0
SMALLEST_AREA = 0.5
WIDEST_ASPECT = 3.0
"""How far from its native size a model that draws any size is trusted: beyond twice the area it was trained on a
latent diffusion model repeats its subject, far below it the picture falls apart."""


def drawable_size(capabilities: Capabilities, width: int, height: int) -> tuple[int, int]:
    """The (width, height) in pixels that the model should draw for a picture of `width` x `height`.

    The very size where the model draws it well; otherwise the nearest one that it does, to be scaled afterwards: its
    native size, or, for a model that draws any size, one of about the same aspect ratio and a trusted area.
    """
    native = (capabilities.native_width, capabilities.native_height)
    if not capabilities.any_size:
        return native
    native_area = native[0] * native[1]
    area = min(max(width * height, SMALLEST_AREA * native_area), LARGEST_AREA * native_area)
    aspect = min(max(width / height, 1 / WIDEST_ASPECT), WIDEST_ASPECT)
    multiple = capabilities.size_multiple
    return _nearest(sqrt(area * aspect), multiple), _nearest(sqrt(area / aspect), multiple)


def _nearest(length: float, multiple: int) -> int:
    return max(1, round(length / multiple)) * multiple


def supports(capabilities: Capabilities, mode: Mode) -> bool:
    """Can the model work in this mode? It always can in `auto`."""
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
    """Refuse what the model cannot do.

    references: how many are pinned.

    Raises:
        UnsupportedModeError: the explicit mode is not one of the model's.
        UnsupportedParameterError: an unknown scheduler or LoRA, more references than the model takes, or a negative
            prompt for a model that has no use for one.
    """
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
        raise UnsupportedParameterError("This model has no use for a negative prompt.", parameter="negative_prompt")


def resolve_mode(
    capabilities: Capabilities, mode: Mode, *, references: int, captions: int | None = None, pinned: bool = False
) -> tuple[Mode, str]:
    """The mode to work in, never `auto`, and a sentence that says why.

    references: how many passed the relevance gate or are pinned. captions: how many of those have a caption; none
    when that is not known. pinned: the request named them.

    Raises:
        UnsupportedModeError: the explicit mode is not one of the model's.
    """
    check_parameters(capabilities, mode=mode)
    given = "the request pinned references" if pinned else "relevant references were found"
    if mode is Mode.NONE:
        return Mode.NONE, "The request asked for no references."
    if references == 0:
        return Mode.NONE, "No reference is relevant enough, so the prompt is drawn alone."
    if mode is not Mode.AUTO:
        return mode, "The request asked for this mode."
    if supports(capabilities, Mode.IMAGE_PROMPT):
        return Mode.IMAGE_PROMPT, f"The model takes image prompts, and {given}."
    if supports(capabilities, Mode.REFERENCE):
        return Mode.REFERENCE, f"The model takes several reference images, and {given}."
    if captions == 0 or not supports(capabilities, Mode.CAPTION):
        return Mode.NONE, "The model takes no image prompts, and no relevant reference has a caption."
    return Mode.CAPTION, "The model takes no image prompts, so the captions of the relevant references are used."
