"""Studio's search page, and the planned references that the page `create` shows for a prompt."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
from flask import Response, current_app, g, request
from werkzeug.datastructures import MultiDict

from api_service import services
from api_service.http import problems, requests
from api_service.studio.choices import Choices
from api_service.studio.pages import filled_fields, page_blueprint, render_page, show_errors_on
from api_service.studio.translations import _
from shared.contracts.generation import Mode
from shared.contracts.images import ImageView
from shared.contracts.search import (
    ImageFilter,
    PlannedReference,
    RagSearchQuery,
    RagSearchResponse,
    SearchRequest,
    SearchResponse,
)
from shared.errors import ResourceNotFoundError
from shared.settings import get_settings

studio_search = page_blueprint("studio_search")

MAX_PINNED, MAX_AVOIDED = 16, 64
SEARCH_FIELDS = ("query", "k", "threshold", "image_id", "diversity", "collection", "mode")


MAX_FOUND = 12


@studio_search.get("/memories")
def memories() -> Response:
    """Show the images of the corpus for the words in `find`: a part of the page `create`."""
    return render_page("memories", active="create", form=request.args, found=found_memories(request.args))


def found_memories(form: "MultiDict[str, str]") -> SearchResponse | None:
    """Search the form's collection for its field `find`, without pinned images; `None`: it has no words.

    Raises:
        EmbeddingUnavailableError: no embed worker answered in time.
        ValidationError: a value of the form is not valid.
    """
    sent = filled_fields(form, ("find",))
    if not sent:
        return None
    values = {"query": sent["find"], "k": MAX_FOUND, "filter": sent_filter(form)}
    found = SearchResponse.model_validate_json(
        services.search.search_images(
            requests.parse_form(SearchRequest, values), caller=g.caller, decoder=current_app.extensions["decoder"]
        )
    )
    pinned = form.getlist("pin")
    return found.model_copy(update={"results": [each for each in found.results if str(each.image_id) not in pinned]})


@studio_search.get("/references")
def references() -> Response:
    """Show the references for the prompt: the part of the page `create` that follows it."""
    return render_page("references", active="create", form=request.args, shown=shown_references(request.args))


PLAN_FIELDS = (
    *("prompt", "concepts", "avoid", "avoid_ids"),
    *("model", "min_similarity", "similar_examples_count", "collection", "filter"),
)
"""Fields of the page `create` on which the planned references depend."""


def plan_key(form: "MultiDict[str, str]") -> str:
    """Return a digest of these fields. While it is the same, the planned references are those for the form."""
    sent = filled_fields(form, PLAN_FIELDS).to_dict(flat=False)
    values = {"model": [get_settings().model.default_generator], **sent}
    return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_SORT_KEYS)).hexdigest()


@dataclass(frozen=True)
class Plan:
    """The references that a generation would use beside the pinned ones."""

    search: RagSearchResponse
    without_room: frozenset[UUID]
    """Relevant references that pinned ones and pictures leave no room for."""
    key: str
    """See `plan_key`."""

    def uses(self, reference: PlannedReference) -> bool:
        return reference.used and reference.image_id not in self.without_room


@dataclass(frozen=True)
class ShownReferences:
    """Everything that the page `create` shows about references."""

    choices: Choices
    plan: Plan | None = None
    pinned: Sequence[ImageView] = ()
    avoided: Sequence[ImageView] = ()
    ended: Sequence[ImageView] = ()
    """Images that left the plan, so the person's choices for them have ended."""
    weighs: bool = True
    """Whether the weights of references change the picture."""
    problem: str | None = None
    """Reason why the references cannot be shown."""

    def uses(self, reference: PlannedReference) -> bool:
        """Whether the form shows the reference as used: by the plan, unless the person chose otherwise."""
        image_id = str(reference.image_id)
        planned = self.plan is not None and self.plan.uses(reference)
        return image_id not in self.choices.dropped and (planned or image_id in self.choices.added)


def shown_references(form: "MultiDict[str, str]", *, pictures: int = 0) -> ShownReferences:
    """Plan the references for the form, and keep the choices that the person made before.

    pictures: number of pictures that were sent with the form.

    Raises:
        Exception: all errors of `plan_references`.
    """
    choices, pinned, avoided = Choices.of(form), pinned_images(form), avoided_images(form)
    pictures += len(form.getlist("from_output")) + (int(form["pictures"]) if form.get("pictures", "").isdigit() else 0)
    plan = plan_references(form, pinned, avoided, pictures=pictures)
    still_there = {str(each.id) for each in (*pinned, *avoided)}
    if plan is not None:
        still_there |= {str(each.image_id) for each in plan.search.references}
    ended = _named_images([each for each in choices.named if each not in still_there])
    weighs = plan is None or plan.search.mode != Mode.REFERENCE or _weighs_references(form.get("model"))
    return ShownReferences(choices, plan, pinned, avoided, ended, weighs)


def _weighs_references(name: str | None) -> bool:
    """Whether the model weighs references that it reads. name: `None` for the default model."""
    models = services.status.models().models
    model = next((each for each in models if each.name == name or (not name and each.default)), None)
    return model is None or model.capabilities is None or model.capabilities.weighs_references


def plan_references(
    form: "MultiDict[str, str]", pinned: Sequence[ImageView], avoided: Sequence[ImageView], *, pictures: int = 0
) -> Plan | None:
    """Plan the references for the form's prompt, beside pinned images and sent pictures, without the avoided images.

    `None`: the form has no prompt, or wants no references.

    Raises:
        EmbeddingUnavailableError: no embed worker answered in time.
        ModelNotFoundError: no model of this name is configured.
        ValidationError: a value of the form is not valid.
    """
    sent = filled_fields(form, ("prompt", "model", "min_similarity", "similar_examples_count"))
    if "prompt" not in sent or sent.get("similar_examples_count") == "0":
        return None
    if "similar_examples_count" in sent:
        sent["k"] = sent.pop("similar_examples_count")
    concepts = sent_concepts(form)
    sent.setlist("concept", concepts or [])
    if concepts is None:
        sent["split_prompt"] = "false"
    sent.setlist("avoid", sent_lines(form, "avoid"))
    sent.setlist("avoid_ids", [str(image.id) for image in avoided])
    query = requests.parse_form(RagSearchQuery, requests.field_values(RagSearchQuery, sent, where="form"))
    where = requests.parse_form(ImageFilter, sent_filter(form))
    response = services.search.plan_references(query, caller=g.caller, where=where)
    models = get_settings().model
    most = models.generators[query.model or models.default_generator].max_references
    room = max(0, min(most, query.k or most) - len(pinned) - pictures)
    pinned_ids = {image.id for image in pinned}
    used = [each.image_id for each in response.references if each.used and each.image_id not in pinned_ids]
    return Plan(response, frozenset(used[room:]), plan_key(form))


def sent_concepts(form: "MultiDict[str, str]") -> list[str] | None:
    """Return the concepts of the form, one per line of its field `concepts`; `None`: the whole prompt is the only one.

    A line that is the prompt stands for it, because a prompt may have several lines.
    """
    lines = sent_lines(form, "concepts")
    return None if lines == [" ".join(form.get("prompt", "").split())] else lines


def sent_lines(form: "MultiDict[str, str]", name: str) -> list[str]:
    """Return the lines of a field that are not blank."""
    return [" ".join(line.split()) for line in form.get(name, "").splitlines() if line.strip()]


def pinned_images(form: "MultiDict[str, str]") -> list[ImageView]:
    """Return the images that the form pins. Ids that are invalid or no longer exist are left out."""
    return _named_images(form.getlist("pin")[:MAX_PINNED])


def avoided_images(form: "MultiDict[str, str]") -> list[ImageView]:
    """Return the images that the form wants to avoid as references, without ids as in `pinned_images`."""
    return _named_images(form.getlist("avoid_ids")[:MAX_AVOIDED])


def _named_images(image_ids: Sequence[str]) -> list[ImageView]:
    named = []
    for image_id in dict.fromkeys(image_ids):
        try:
            named.append(services.images.get(UUID(image_id), caller=g.caller))
        except (ValueError, ResourceNotFoundError):
            continue
    return named


def sent_filter(form: "MultiDict[str, str]") -> dict[str, Any]:
    """Return the form's filter: its field `filter`, a JSON object, with its field `collection`.

    Raises:
        ValidationError: `filter` is not a JSON object.
    """
    sent = filled_fields(form, ("filter", "collection"))
    try:
        conditions = orjson.loads(sent.get("filter", "{}"))
    except orjson.JSONDecodeError:
        conditions = None
    if not isinstance(conditions, dict):
        raise problems.field_error(
            "form.filter", "json_invalid", _('Must be a JSON object, such as {"tags": ["fruit"]}.')
        )
    return conditions | ({"collection": sent["collection"]} if "collection" in sent else {})


@studio_search.route("/search", methods=["GET", "POST"])
def search() -> Response:
    """Search by words, by an uploaded picture, by a corpus image, or by words and one of these images.

    The field `negative` has words that the results must not resemble.
    """
    form = request.form if request.method == "POST" else request.args
    show_errors_on(lambda: render_page("search", active="corpus", found=None, similar_to=None, form=form))
    file = request.files.get("image")
    picture = file.read() if file is not None else b""
    sent = filled_fields(form, SEARCH_FIELDS)
    collection = sent.pop("collection", None)
    values = requests.field_values(SearchRequest, sent, where="form")
    unwanted = filled_fields(form, ("negative",))
    if not values.keys() & {"query", "image_id"} and not picture:
        return render_page("search", active="corpus", found=None, similar_to=None, form=form)
    if picture:
        values["image"] = base64.b64encode(picture).decode()
    if collection:
        values["filter"] = {"collection": collection}
    if unwanted:
        values["negative"] = [{"text": text} for text in unwanted.values()]
    search_request = requests.parse_form(SearchRequest, values)
    found = SearchResponse.model_validate_json(
        services.search.search_images(search_request, caller=g.caller, decoder=current_app.extensions["decoder"])
    )
    similar_to = services.images.get(search_request.image_id, caller=g.caller) if search_request.image_id else None
    return render_page("search", active="corpus", found=found, similar_to=similar_to, form=form)
