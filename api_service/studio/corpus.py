"""Studio's pages of the corpus: browse, add, view and delete images."""

from typing import Any
from uuid import UUID

from flask import Response, current_app, g, request

from api_service import services
from api_service.http import multipart, requests
from api_service.studio.pages import (
    IMAGES_PER_PAGE,
    filled_fields,
    page_blueprint,
    read_form,
    redirect_to,
    render_page,
    show_errors_on,
)
from shared.contracts.images import Cascade, ImageDelete, ImageQuery, UploadFields
from shared.contracts.outputs import OutputQuery
from shared.errors import AuthorizationError

studio_corpus = page_blueprint("studio_corpus")

OUTPUTS_SHOWN = 24
"""Latest outputs that are shown on the page of a corpus image."""


@studio_corpus.get("/corpus")
@studio_corpus.get("/memory", alias=True)  # addresses of former releases redirect
def corpus() -> Response:
    show_errors_on(lambda: _list(ImageQuery(limit=IMAGES_PER_PAGE)))
    return _list(read_form(ImageQuery, request.args, ("collection", "tag", "state", "cursor"), limit=IMAGES_PER_PAGE))


def _list(query: ImageQuery, **form: Any) -> Response:
    """form: values of the form for uploads, by name."""
    images = services.images.list_page(query, caller=g.caller)
    return render_page("corpus", active="corpus", images=images, query=query, upload=form)


@studio_corpus.post("/corpus")
@studio_corpus.post("/memory", alias=True)
def upload() -> Response:
    show_errors_on(lambda: _list(ImageQuery(limit=IMAGES_PER_PAGE), **request.form.to_dict()))
    values = requests.field_values(
        UploadFields, filled_fields(request.form, ("caption", "tags", "licence", "source", "collection")), where="form"
    )
    if "tags" in values:
        values["tags"] = requests.split_tags(values["tags"])
    fields = requests.parse_form(UploadFields, values)
    files = [file for file in multipart.uploaded_files(request) if file.name]
    services.images.upload(files, fields, caller=g.caller, decoder=current_app.extensions["decoder"])
    return redirect_to("studio_corpus.corpus", collection=fields.collection)


@studio_corpus.get("/corpus/<uuid:image_id>")
@studio_corpus.get("/memory/<uuid:image_id>", alias=True)
def image(image_id: UUID) -> Response:
    view = services.images.get(image_id, caller=g.caller)
    outputs = services.outputs.list_page(OutputQuery(limit=OUTPUTS_SHOWN, reference_id=image_id), caller=g.caller)
    return render_page("image", active="corpus", image=view, outputs=outputs)


@studio_corpus.get("/corpus/<uuid:image_id>/withdraw")
def withdraw(image_id: UUID) -> Response:
    """Show what would be withdrawn with the image, and ask for the reason."""
    if "corpus:write" not in g.caller.scopes:  # as the API asks for the same numbers
        raise AuthorizationError("This API key lacks the scope 'corpus:write'.", scope="corpus:write")
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
