"""The corpus: upload, list, look, change, delete."""

from pathlib import PurePath
from uuid import UUID

from flask import Response, current_app, g, request
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import multipart, responses
from api_service.http.blueprint import Resource
from api_service.services.views import API
from shared.contracts.common import Contract, ImageFormat, Page, PageQuery
from shared.contracts.images import ImagePatch, ImageQuery, ImageView, UploadResponse
from shared.contracts.jobs import OutputView
from shared.contracts.outputs import OutputQuery

images = Resource("images", __name__, url_prefix=API, abp_tags=[Tag(name="images", description="What is remembered.")])


class ImagePath(Contract):
    image_id: UUID


@images.post("/upload", operation_id="uploadImages", responses={201: UploadResponse, 200: UploadResponse})
def upload() -> Response:
    """Add images to the corpus

    All files of a request are kept or none, or with `on_invalid=skip` all that are images; `files` says what became of
    each. A file that the collection already has is answered with the image it has.
    They become searchable as soon as a worker has embedded them: `state` is then `ready`.
    """
    uploaded = services.images.upload(
        multipart.files(request),
        multipart.upload_fields(request),
        caller=g.caller,
        decoder=current_app.extensions["decoder"],
    )
    return responses.json(uploaded, 201 if uploaded.created else 200)


@images.get("/images", operation_id="listImages", responses={200: Page[ImageView]})
def list_images(query: ImageQuery) -> Page[ImageView]:
    """The images of a collection, newest first"""
    return services.images.page(query, caller=g.caller)


@images.get("/images/<image_id>", operation_id="getImage", responses={200: ImageView})
def get_image(path: ImagePath) -> ImageView:
    """One image"""
    return services.images.image(path.image_id, caller=g.caller)


@images.patch("/images/<image_id>", operation_id="changeImage", responses={200: ImageView})
def change_image(path: ImagePath, body: ImagePatch) -> ImageView:
    """Change what is said of an image

    Fields that are not given stay as they are; null empties one.
    """
    return services.images.change(path.image_id, body, caller=g.caller)


@images.delete("/images/<image_id>", operation_id="deleteImage", responses={204: None})
def delete_image(path: ImagePath) -> Response:
    """Forget an image: no search and no new generation meets it again"""
    services.images.remove(path.image_id, caller=g.caller)
    return responses.no_content()


@images.get("/images/<image_id>/content", operation_id="getImageContent")
def get_content(path: ImagePath) -> Response:
    """The file"""
    row = services.images.row(path.image_id, caller=g.caller)
    stem = PurePath(row.filename).stem if row.filename else str(row.id)
    return responses.blob(
        row.blob_key,
        etag=row.sha256,
        media_type=ImageFormat(row.format).media_type,
        size_bytes=row.size_bytes,
        filename=f"{stem}.{row.format}",
    )


@images.get("/images/<image_id>/thumbnail", operation_id="getImageThumbnail")
def get_thumbnail(path: ImagePath) -> Response:
    """A small WebP"""
    row = services.images.row(path.image_id, caller=g.caller)
    return responses.thumbnail(row.thumbnail_key, sha256=row.sha256, name=str(row.id))


@images.get("/images/<image_id>/generations", operation_id="listGenerationsOfImage", responses={200: Page[OutputView]})
def list_generations(path: ImagePath, query: PageQuery) -> Page[OutputView]:
    """Every output that used this image, also after it was deleted"""
    return services.outputs.list_page(
        OutputQuery(limit=query.limit, cursor=query.cursor, reference_id=path.image_id), caller=g.caller
    )
