"""What is remembered of words or of a picture: the plan of a generation, and searching."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from flask import Response, current_app, g, request
from werkzeug.datastructures import MultiDict

from api_service import services
from api_service.http import requests
from api_service.studio.pages import filled, page, pages
from shared.contracts.images import ImageView
from shared.contracts.search import (
    PlannedReference,
    RagSearchQuery,
    RagSearchResponse,
    SearchRequest,
    SearchResponse,
)
from shared.errors import ResourceNotFoundError
from shared.settings import get_settings

studio_search = pages("studio_search")

MOST_PINNED = 16
ASKED = ("query", "k", "threshold", "image_id", "diversity", "collection")


@studio_search.get("/references")
def references() -> Response:
    """What a generation would use: the part of the page `create` that follows the prompt."""
    pinned = pinned_images(request.args)
    return page("references", active="create", plan=plan(request.args, pinned), pinned=pinned)


@dataclass(frozen=True)
class Plan:
    """What a prompt would be drawn from. `crowded`: relevant ones for which what is pinned leaves no room."""

    found: RagSearchResponse
    crowded: frozenset[UUID]

    def uses(self, reference: PlannedReference) -> bool:
        return reference.used and reference.image_id not in self.crowded


def plan(form: "MultiDict[str, str]", pinned: Sequence[ImageView]) -> Plan | None:
    """What the form's prompt would be drawn from beside what is pinned; None without a prompt.

    Raises:
        EmbeddingUnavailableError, ModelNotFoundError, ValidationError
    """
    sent = filled(form, ("prompt", "model", "collection", "min_similarity", "similar_examples_count"))
    if "prompt" not in sent:
        return None
    if "similar_examples_count" in sent:
        sent["k"] = sent.pop("similar_examples_count")
    query = requests.form(RagSearchQuery, requests.fields(RagSearchQuery, sent, where="form"))
    found = services.search.references_for(query, caller=g.caller)
    models = get_settings().model
    room = max(0, models.generators[query.model or models.default_generator].max_references - len(pinned))
    there = {image.id for image in pinned}
    used = [each.image_id for each in found.references if each.used and each.image_id not in there]
    return Plan(found, frozenset(used[room:]))


def pinned_images(form: "MultiDict[str, str]") -> list[ImageView]:
    pinned = []
    for sent in list(dict.fromkeys(form.getlist("pin")))[:MOST_PINNED]:
        try:
            pinned.append(services.images.image(UUID(sent), caller=g.caller))
        except (ValueError, ResourceNotFoundError):
            continue  # forgotten since it was pinned
    return pinned


@studio_search.route("/search", methods=["GET", "POST"])
def search() -> Response:
    """By words, by a picture that is sent, by an image of the corpus, or by several of these."""
    form = request.form if request.method == "POST" else request.args
    sent = request.files.get("image")
    picture = sent.read() if sent is not None else b""
    asked = filled(form, ASKED)
    collection = asked.pop("collection", None)
    values = requests.fields(SearchRequest, asked, where="form")
    if not values.keys() & {"query", "image_id"} and not picture:
        return page("search", active="memory", found=None, like=None, form=form)
    if picture:
        values["image"] = base64.b64encode(picture).decode()
    if collection:
        values["filter"] = {"collection": collection}
    wanted = requests.form(SearchRequest, values)
    answer = services.search.images_like(wanted, caller=g.caller, decoder=current_app.extensions["decoder"])
    like = services.images.image(wanted.image_id, caller=g.caller) if wanted.image_id else None
    return page("search", active="memory", found=SearchResponse.model_validate_json(answer), like=like, form=form)
