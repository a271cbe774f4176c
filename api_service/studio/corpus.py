"""The corpus as pages: browse, add, look at one image and at what it shaped, forget it."""

from uuid import UUID

from flask import Response, current_app, g, request

from api_service import services
from api_service.http import multipart, requests
from api_service.studio.pages import PICTURES, filled, page, pages, read, to
from shared.contracts.images import ImageQuery, UploadFields
from shared.contracts.outputs import OutputQuery

studio_corpus = pages("studio_corpus")

SHAPED = 24


@studio_corpus.get("/memory")
def memory() -> Response:
    query = read(ImageQuery, request.args, ("collection", "tag", "state", "cursor"), limit=PICTURES)
    return page("memory", active="memory", images=services.images.page(query, caller=g.caller), query=query)


@studio_corpus.post("/memory")
def upload() -> Response:
    said = requests.fields(
        UploadFields, filled(request.form, ("caption", "tags", "licence", "source", "collection")), where="form"
    )
    if "tags" in said:
        said["tags"] = multipart.tags(said["tags"])
    fields = requests.form(UploadFields, said)
    sent = [file for file in multipart.files(request) if file.name]
    services.images.upload(sent, fields, caller=g.caller, decoder=current_app.extensions["decoder"])
    return to("studio_corpus.memory", collection=fields.collection)


@studio_corpus.get("/memory/<uuid:image_id>")
def image(image_id: UUID) -> Response:
    shown = services.images.image(image_id, caller=g.caller)
    shaped = services.outputs.list_page(OutputQuery(limit=SHAPED, reference_id=image_id), caller=g.caller)
    return page("image", active="memory", image=shown, shaped=shaped)


@studio_corpus.post("/memory/<uuid:image_id>/forget")
def forget(image_id: UUID) -> Response:
    collection = services.images.image(image_id, caller=g.caller).collection
    services.images.remove(image_id, caller=g.caller)
    return to("studio_corpus.memory", collection=collection)
