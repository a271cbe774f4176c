"""Routes of the corpus: upload, list, read, change and delete images."""

from pathlib import PurePath
from uuid import UUID

from flask import Response, current_app, g, request
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import multipart, responses
from api_service.http.blueprint import ApiBlueprint
from api_service.http.urls import API
from shared.contracts.common import Contract, ImageFormat, Page, PageQuery
from shared.contracts.images import ImageDelete, ImagePatch, ImageQuery, ImageView, UploadResponse, WithdrawalView
from shared.contracts.jobs import OutputView
from shared.contracts.outputs import OutputQuery

images = ApiBlueprint(
    "images", __name__, url_prefix=API, abp_tags=[Tag(name="images", description="Images of the corpus.")]
)


class ImagePath(Contract):
    image_id: UUID


@images.post("/upload", operation_id="uploadImages", responses={201: UploadResponse, 200: UploadResponse})
def upload() -> Response:
    """Add images to the corpus

    All files of a request are stored, or none. With `on_invalid=skip`, invalid files are left out. `files` has the
    outcome of each file. For a file that the collection already has, the answer contains the existing image.

    An image is searchable when its `state` is `ready`, which is as soon as a worker has embedded it.
    """
    uploaded = services.images.upload(
        multipart.uploaded_files(request),
        multipart.upload_fields(request),
        caller=g.caller,
        decoder=current_app.extensions["decoder"],
    )
    return responses.json(uploaded, 201 if uploaded.created else 200)


@images.get("/images", operation_id="listImages", responses={200: Page[ImageView]})
def list_images(query: ImageQuery) -> Page[ImageView]:
    """List the images of a collection, newest first"""
    return services.images.list_page(query, caller=g.caller)


@images.get("/images/<image_id>", operation_id="getImage", responses={200: ImageView})
def get_image(path: ImagePath) -> ImageView:
    """Get an image"""
    return services.images.get(path.image_id, caller=g.caller)


@images.patch("/images/<image_id>", operation_id="changeImage", responses={200: ImageView})
def change_image(path: ImagePath, body: ImagePatch) -> ImageView:
    """Change the description of an image

    Fields that are left out keep their values. `null` empties a field.
    """
    return services.images.update(path.image_id, body, caller=g.caller)


@images.delete("/images/<image_id>", operation_id="deleteImage", responses={204: None, 200: WithdrawalView})
def delete_image(path: ImagePath, query: ImageDelete) -> Response:
    """Delete an image from the corpus

    No search and no new generation uses it from then on. Outputs that drew from it stay.

    With `cascade=withdraw` they are withdrawn: every request for one of them gets 410 `output_withdrawn`, and their
    files are deleted. Images that are such outputs go too, with the outputs that drew from them. Nothing of this can be
    undone. `dry_run=true` only counts. If outputs or images of other owners are among them, the key needs the scope
    `admin` as well.
    """
    if query.cascade is None:
        services.images.delete(path.image_id, caller=g.caller)
        return responses.no_content()
    return responses.json(services.images.withdraw(path.image_id, query, caller=g.caller))


@images.get("/images/<image_id>/content", operation_id="getImageContent")
def get_content(path: ImagePath) -> Response:
    """Download the file"""
    row = services.images.get_row(path.image_id, caller=g.caller)
    stem = PurePath(row.filename).stem if row.filename else str(row.id)
    return responses.stored_file(
        row.blob_key,
        etag=PurePath(row.blob_key).stem,
        media_type=ImageFormat(row.format).media_type,
        size_bytes=row.size_bytes,
        filename=f"{stem}.{row.format}",
    )


@images.get("/images/<image_id>/thumbnail", operation_id="getImageThumbnail")
def get_thumbnail(path: ImagePath) -> Response:
    """Download a thumbnail (WebP)"""
    row = services.images.get_row(path.image_id, caller=g.caller)
    return responses.thumbnail(row.thumbnail_key, sha256=PurePath(row.thumbnail_key).stem, name=str(row.id))


@images.get("/images/<image_id>/generations", operation_id="listGenerationsOfImage", responses={200: Page[OutputView]})
def list_generations(path: ImagePath, query: PageQuery) -> Page[OutputView]:
    """List the outputs that used this image

    This works for a deleted image too.
    """
    return services.outputs.list_page(
        OutputQuery(limit=query.limit, cursor=query.cursor, reference_id=path.image_id), caller=g.caller
    )
