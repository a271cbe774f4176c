"""The ways in which the images of a job will differ from the request, known before the model starts."""

from collections.abc import Iterator, Sequence

from shared import retrieval
from shared.contracts.jobs import JobWarning
from worker_service.jobs import outputs
from worker_service.models.generation import framing
from worker_service.models.interface import ImageRequest, UnreadTexts


def differences(
    request: ImageRequest, references: Sequence[retrieval.Candidate], *, unread: UnreadTexts, weighed: bool
) -> list[JobWarning]:
    """Warnings about the images of a job. Its requests differ in the seed only, so that one stands for all.

    references: those that the job uses. unread: texts of the request that are beyond a limit of the model. weighed:
    no warning about weights is needed, because the model weighs references, or the request named no weights.
    """
    return [
        *_of_texts(unread),
        *_of_size(request),
        *_of_initial_image(request, references),
        *(() if weighed else _of_weights(request, references)),
    ]


def _of_texts(unread: UnreadTexts) -> Iterator[JobWarning]:
    for code, name, text in (
        ("prompt_cut", "prompt", unread.prompt),
        ("negative_prompt_cut", "negative prompt", unread.negative_prompt),
    ):
        if text:
            detail = f"The {name} is longer than the text that the model reads. It does not read the end."
            yield JobWarning(code=code, detail=detail, context={"unread": text})
    for caption in unread.captions:
        detail = "A caption is left out, because the prompt with it is longer than the text that the model reads."
        yield JobWarning(code="caption_left_out", detail=detail, context={"caption": caption})


def _of_size(request: ImageRequest) -> Iterator[JobWarning]:
    crop = framing.crop_of(request)
    if crop is None or request.output_size is None:
        return
    left, top, right, bottom = crop
    width, height = request.output_size
    yield JobWarning(
        code="image_cropped",
        detail=f"The model draws {request.width} x {request.height} pixels. The middle {right - left:g} x "
        f"{bottom - top:g} of them become the {width} x {height} of the image.",
        context={"drawn": [request.width, request.height], "crop": crop},
    )


def _of_weights(request: ImageRequest, references: Sequence[retrieval.Candidate]) -> Iterator[JobWarning]:
    # Only of references that the request named: the weights of searched ones are no wish of the request.
    weights = {reference.weight for reference in references if reference.pinned}
    if request.mode.traits.uses_native_references and len(weights) > 1:
        detail = "The model does not weigh references. Their weights decide only their order."
        yield JobWarning(code="weights_not_applied", detail=detail)


def _of_initial_image(request: ImageRequest, references: Sequence[retrieval.Candidate]) -> Iterator[JobWarning]:
    box = outputs.initial_image_box(request, references)
    if box is None:
        return
    drawn = (request.width, request.height)
    left, top, right, bottom = framing.visible_part(drawn, request.output_size or drawn)
    if right - left - (box[2] - box[0]) > 1 or bottom - top - (box[3] - box[1]) > 1:
        yield JobWarning(
            code="reference_padded",
            detail="The reference has another ratio than the image. It lies whole in the middle, and the colours of "
            "its edges fill the space beside it.",
            context={"drawn": list(drawn), "box": list(box)},
        )
