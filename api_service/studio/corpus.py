"""Studio's pages of the corpus: browse, add, view, describe and delete images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from flask import Response, current_app, g, request
from pydantic import Field

from api_service import services
from api_service.http import multipart, problems, requests
from api_service.http.multipart import SentFile
from api_service.studio.pages import (
    IMAGES_PER_PAGE,
    filled_fields,
    page_blueprint,
    read_form,
    redirect_to,
    render_page,
    selected_ids,
    show_errors_on,
    wants_fragment,
)
from api_service.studio.translations import _
from shared.contracts.common import Contract, MatchedText, OnInvalid, Tags
from shared.contracts.images import (
    Cascade,
    ImageDelete,
    ImagePatch,
    ImageQuery,
    ImageState,
    ImageView,
    UploadedFile,
    UploadFields,
    UploadResponse,
)
from shared.contracts.outputs import OutputQuery
from shared.contracts.search import ImageFilter, Neighbour, SearchMode, SearchRequest, SearchResponse
from shared.errors import AuthorizationError, ReferenceUnavailableError, ResourceNotFoundError
from shared.settings import get_settings

studio_corpus = page_blueprint("studio_corpus")

FILTERS = ("collection", "tag", "state", "cursor")
DESCRIPTION = ("caption", "tags", "licence", "source")
OUTPUTS_SHOWN = 24
"""Latest outputs that are shown on the page of a corpus image."""
NEAR_DUPLICATES_SHOWN = 12


# --- list and add -------------------------------------------------------------------------------------------------


@studio_corpus.get("/corpus")
@studio_corpus.get("/memory", alias=True)  # addresses of former releases redirect
def corpus() -> Response:
    show_errors_on(lambda: _list(ImageQuery(limit=IMAGES_PER_PAGE)))
    return _list(_query())


def _query() -> ImageQuery:
    return read_form(ImageQuery, request.args, FILTERS, limit=IMAGES_PER_PAGE)


def _list(query: ImageQuery, *, added: Sequence["AddedFile"] = (), form: Mapping[str, str] | None = None) -> Response:
    """added: outcomes of the files that were sent. form: the form for uploads that was sent, if it stays open."""
    images = services.images.list_page(query, caller=g.caller)
    may_write = "corpus:write" in g.caller.scopes
    return render_page(
        "corpus",
        active="corpus",
        images=images,
        query=query,
        is_filtered=bool(query.tag or query.state or query.cursor),
        upload=form or {},
        added=added,
        may_write=may_write,
    )


@dataclass(frozen=True)
class AddedFile:
    """The outcome of one file of an upload. image: `None` if the file was skipped."""

    name: str
    outcome: UploadedFile
    image: ImageView | None


@studio_corpus.post("/corpus")
@studio_corpus.post("/memory", alias=True)
def upload() -> Response:
    """Add files to the corpus. If one of several is invalid, the others are stored. A script sends each file alone."""
    show_errors_on(lambda: _list(ImageQuery(limit=IMAGES_PER_PAGE), form=request.form))
    values = requests.field_values(
        UploadFields, filled_fields(request.form, (*DESCRIPTION, "collection")), where="form"
    )
    if "tags" in values:
        values["tags"] = requests.split_tags(values["tags"])
    files = [file for file in multipart.uploaded_files(request) if file.name]
    on_invalid = OnInvalid.SKIP if len(files) > 1 or wants_fragment() else OnInvalid.REFUSE
    fields = requests.parse_form(UploadFields, {**values, "on_invalid": on_invalid})
    stored = services.images.upload(files, fields, caller=g.caller, decoder=current_app.extensions["decoder"])
    added = _added_files(files, stored)
    if wants_fragment():
        return render_page("corpus_added", active="corpus", added=added)
    if all(each.image for each in added):
        return redirect_to("studio_corpus.corpus", collection=fields.collection)
    query = ImageQuery(collection=fields.collection, limit=IMAGES_PER_PAGE)
    return _list(query, added=added, form=request.form)


def _added_files(files: Sequence[SentFile], stored: UploadResponse) -> list[AddedFile]:
    images = {each.id: each for each in stored.images}
    return [
        AddedFile(file.name or "", outcome, images[outcome.image_id] if outcome.image_id else None)
        for file, outcome in zip(files, stored.files, strict=True)
    ]


# --- several images -----------------------------------------------------------------------------------------------


class SelectionPatch(Contract):
    """Changes of the descriptions of several images. Fields that are left out stay."""

    add_tags: Tags = Field(default_factory=list)
    remove_tags: Tags = Field(default_factory=list)
    licence: MatchedText | None = None

    def of(self, image: ImageView) -> ImagePatch:
        """Return the changes of one image."""
        kept = [tag for tag in image.tags if tag not in self.remove_tags]
        tags = [*kept, *(tag for tag in self.add_tags if tag not in kept)]
        licence = {} if self.licence is None else {"licence": self.licence}
        return requests.parse_form(ImagePatch, {"tags": tags, **licence})


@studio_corpus.post("/corpus/selected")
def change_selected() -> Response:
    """Change the tags and the licence of the selected images. An image that is gone is left out."""
    show_errors_on(lambda: _list(_query()))
    selected = selected_ids()
    sent = filled_fields(request.form, ("add_tags", "remove_tags", "licence"))
    if not sent:
        raise problems.field_error("form.add_tags", "missing", _("Write a tag or a licence first."))
    values = requests.field_values(SelectionPatch, sent, where="form")
    tags = {name: requests.split_tags(values.get(name, [])) for name in ("add_tags", "remove_tags")}
    patch = requests.parse_form(SelectionPatch, values | tags)
    for image_id in selected:
        try:
            view = services.images.get(image_id, caller=g.caller)
            services.images.update(image_id, patch.of(view), caller=g.caller)
        except ResourceNotFoundError:
            continue
    return _back_to_list()


@studio_corpus.post("/corpus/selected/delete")
def delete_selected() -> Response:
    show_errors_on(lambda: _list(_query()))
    for image_id in selected_ids():
        try:
            services.images.delete(image_id, caller=g.caller)
        except ResourceNotFoundError:
            continue
    return _back_to_list()


def _back_to_list() -> Response:
    """Redirect to the list, with the filters of the address that the form was sent to."""
    return redirect_to("studio_corpus.corpus", **{name: request.args.get(name) for name in FILTERS})


# --- one image ----------------------------------------------------------------------------------------------------


@studio_corpus.get("/corpus/<uuid:image_id>")
@studio_corpus.get("/memory/<uuid:image_id>", alias=True)
def image(image_id: UUID) -> Response:
    return _one(image_id)


def _one(image_id: UUID) -> Response:
    view = services.images.get(image_id, caller=g.caller)
    outputs = services.outputs.list_page(OutputQuery(limit=OUTPUTS_SHOWN, reference_id=image_id), caller=g.caller)
    return render_page(
        "image",
        active="corpus",
        image=view,
        outputs=outputs,
        near_duplicates=_near_duplicates(view),
        may_write="corpus:write" in g.caller.scopes,
    )


def _near_duplicates(view: ImageView) -> list[Neighbour]:
    """Return the images of its collection that a plan of references would count as duplicates, nearest first."""
    if view.state is not ImageState.READY:
        return []
    query = SearchRequest(
        image_id=view.id,
        threshold=get_settings().retrieval.duplicate_similarity,
        k=NEAR_DUPLICATES_SHOWN + 1,
        mode=SearchMode.VECTOR,
        filter=ImageFilter(collection=view.collection),
    )
    try:
        found = services.search.search_images(query, caller=g.caller, decoder=current_app.extensions["decoder"])
    except ReferenceUnavailableError:  # it has no vector of the active space yet
        return []
    results = SearchResponse.model_validate_json(found).results
    return [each for each in results if each.image_id != view.id][:NEAR_DUPLICATES_SHOWN]


@studio_corpus.post("/corpus/<uuid:image_id>")
def change(image_id: UUID) -> Response:
    """Set the fields of the description that the form has; an empty field is emptied."""
    show_errors_on(partial(_one, image_id))
    sent = filled_fields(request.form, DESCRIPTION)
    values: dict[str, Any] = {name: None for name in DESCRIPTION if name in request.form}
    values |= requests.field_values(ImagePatch, sent, where="form")
    if "tags" in sent:
        values["tags"] = requests.split_tags(sent.getlist("tags"))
    view = services.images.update(image_id, requests.parse_form(ImagePatch, values), caller=g.caller)
    if wants_fragment():
        return render_page("corpus_card", active="corpus", image=view, may_write=True)
    return redirect_to("studio_corpus.image", image_id=image_id)


@studio_corpus.get("/corpus/<uuid:image_id>/withdraw")
def withdraw(image_id: UUID) -> Response:
    """Show what would be withdrawn with the image, and ask for the reason."""
    if "corpus:write" not in g.caller.scopes:  # as the API asks for the same numbers
        raise AuthorizationError(_("This API key lacks the scope 'corpus:write'."), scope="corpus:write")
    view = services.images.get(image_id, caller=g.caller)
    query = ImageDelete(cascade=Cascade.WITHDRAW, dry_run=True)
    withdrawal = services.images.withdraw(image_id, query, caller=g.caller)
    needed = {"corpus:write", "admin"} if withdrawal.needs_admin else {"corpus:write"}
    may_withdraw = needed <= g.caller.scopes
    return render_page("withdraw", active="corpus", image=view, withdrawal=withdrawal, may_withdraw=may_withdraw)


@studio_corpus.post("/corpus/<uuid:image_id>/delete")
@studio_corpus.post("/memory/<uuid:image_id>/forget", alias=True)
def delete_image(image_id: UUID) -> Response:
    collection = services.images.get(image_id, caller=g.caller).collection
    query = read_form(ImageDelete, request.form, ("cascade", "reason"))
    if query.cascade is None:
        services.images.delete(image_id, caller=g.caller)
    else:
        services.images.withdraw(image_id, query, caller=g.caller)
    return redirect_to("studio_corpus.corpus", collection=collection)
