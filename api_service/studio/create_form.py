"""Reads the form of the page `create` into a request."""

import shlex
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import orjson
from flask import g, request
from werkzeug.datastructures import FileStorage, MultiDict

from api_service import services
from api_service.http import requests
from api_service.http.urls import API
from api_service.studio.choices import Choices
from api_service.studio.pages import filled_fields
from api_service.studio.search import plan_key, sent_concepts, sent_filter, sent_lines
from shared.contracts.generation import (
    REFERENCE_FIELDS,
    Mode,
    RagGenerateRequest,
    SentReferenceImage,
)
from shared.contracts.jobs import OutputView
from shared.errors import OutputWithdrawnError, ResourceNotFoundError
from shared.storage import get_blobs

REQUEST_FIELDS = (
    "prompt",
    "negative_prompt",
    "model",
    "num_images",
    "seed",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "mode",
    "strength",
    "ip_adapter_scale",
    "similar_examples_count",
    "min_similarity",
    "collection",
    "scheduler",
    "format",
    "quality",
)
SEARCH_ONLY_FIELDS = ("concepts", "split_prompt", "avoid", "avoid_ids")
"""Fields about a search. A request with chosen references has none."""
LORA_FIELD = "lora."
"""Beginning of the fields with the scale of a LoRA; the name of the LoRA follows."""
PREVIEW_EVERY = 4
MAX_PICTURES = 16


def request_of_form(*, with_plan: bool = True) -> RagGenerateRequest:
    """Build the request from the form that was sent.

    Without a choice of the person, the request has the plan that the form shows. Without a plan for exactly this form,
    the job searches itself. With a choice, or with pictures, the request has exactly the references in use.

    with_plan: `False` for a request to read: a plan is a long token that expires.

    Raises:
        ValidationError: a value of the form is not valid.
        ResourceNotFoundError: an output that serves as a reference is gone.
    """
    form = request.form
    sent = filled_fields(form, REQUEST_FIELDS)
    sent.poplist("collection")
    values = requests.field_values(RagGenerateRequest, sent, where="form")
    values["filter"] = sent_filter(form)
    concepts = sent_concepts(form)
    values["concepts"] = [{"text": text} for text in concepts or ()]
    values["split_prompt"] = concepts is not None
    values["avoid"], values["avoid_ids"] = sent_lines(form, "avoid"), form.getlist("avoid_ids")
    values["loras"] = _sent_loras(form)
    choices, pictures = Choices.of(form), _pictures()
    if choices.changes_plan or pictures:
        values["reference_ids"] = choices.references(form)
        values["reference_images"] = [
            SentReferenceImage.of(each, weight=_weight_of_pictures(choices)) for each in pictures
        ]
        values = {name: value for name, value in values.items() if name not in SEARCH_ONLY_FIELDS}
        if not values["reference_ids"] and not pictures:
            values["mode"] = Mode.NONE
    elif with_plan and form.get("plan") and form.get("planned_for") == plan_key(form):
        values = {name: value for name, value in values.items() if name not in REFERENCE_FIELDS}
        values["plan"] = form["plan"]
    return requests.parse_form(RagGenerateRequest, {"preview_every": PREVIEW_EVERY, **values})


def _sent_loras(form: "MultiDict[str, str]") -> dict[str, str]:
    """Return the scale of each LoRA that the form uses, as it was typed."""
    sent = {name.removeprefix(LORA_FIELD): scale for name, scale in form.items() if name.startswith(LORA_FIELD)}
    return {name: scale for name, scale in sent.items() if scale.strip()}


def _pictures() -> list[bytes]:
    """Return the pictures that were sent with the form, and the files of the outputs that it names."""
    sent: list[FileStorage] = request.files.getlist("reference_image")
    files = [data for data in (each.read() for each in sent[:MAX_PICTURES]) if data]
    outputs = [services.outputs.get_row(each.id, caller=g.caller) for each in named_outputs(request.form)]
    return [*files, *(get_blobs().get(each.blob_key) for each in outputs)]


def _weight_of_pictures(choices: Choices) -> float | None:
    """Return the weight of the strongest shown reference, so that a picture counts as much; `None` without one."""
    weights = [choices.shown_weights[each] for each in choices.used if choices.shown_weights[each]]
    return max((float(each) for each in weights if _is_number(each)), default=None)


def _is_number(text: str) -> bool:
    try:
        return 0 < float(text) <= 100
    except ValueError:
        return False


def named_outputs(form: "MultiDict[str, str]") -> list[OutputView]:
    """Return the outputs that the form uses as references. Ids that are invalid or gone are left out."""
    named = []
    for generation_id in dict.fromkeys(form.getlist("from_output")[:MAX_PICTURES]):
        try:
            named.append(services.outputs.get(UUID(generation_id), caller=g.caller))
        except (ValueError, ResourceNotFoundError, OutputWithdrawnError):
            continue
    return named


def request_for_reading(sent: RagGenerateRequest) -> dict[str, Any]:
    """Return the request as JSON without defaults, and without the data of its pictures."""
    return sent.model_dump(mode="json", exclude_defaults=True, exclude={"preview_every", "reference_images"})


def as_curl(sent: Mapping[str, Any], *, pictures: int, address: str) -> str:
    """Return the command that sends the request. sent: as `request_for_reading`. pictures: their number."""
    text = shlex.quote(orjson.dumps(sent, option=orjson.OPT_INDENT_2).decode())
    words = [f"curl {address}{API}/rag/generate", '-H "Authorization: Bearer $AFTERIMAGE_API_KEY"']
    if pictures:
        files = [f"-F reference_image=@picture-{number}.png" for number in range(1, pictures + 1)]
        words += [f"-F request={text}", *files]
    else:
        words += ["-H 'Content-Type: application/json'", f"-d {text}"]
    return " \\\n  ".join(words)


def as_python(sent: Mapping[str, Any], *, pictures: int, address: str) -> str:
    """Return the program that sends the request and saves its images, as `as_curl`."""
    fields = [f"{name}={value!r}" for name, value in sent.items()]
    imported = "Afterimage, RagGenerateRequest"
    if pictures:
        files = [
            f'SentReferenceImage.of(Path("picture-{number}.png").read_bytes())' for number in range(1, pictures + 1)
        ]
        fields.append(f"reference_images=[{', '.join(files)}]")
        imported += ", SentReferenceImage"
    arguments = "".join(f"\n    {field}," for field in fields)
    return f"""import os
from pathlib import Path

from afterimage_client import {imported}

request = RagGenerateRequest({arguments}
)
with Afterimage({address!r}, api_key=os.environ.get("AFTERIMAGE_API_KEY")) as service:
    job = service.jobs.wait(service.jobs.submit(request))
    for output in job.outputs:
        service.outputs.download(output, Path(f"{{output.seed}}.{{output.format}}"))
"""
