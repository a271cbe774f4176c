"""Routes of the pictures that requests brought as references of their own jobs."""

from pathlib import PurePath
from uuid import UUID

from flask import Response, g
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import responses
from api_service.http.blueprint import ApiBlueprint
from api_service.http.urls import API
from shared.contracts.common import Contract, ImageFormat

reference_images = ApiBlueprint(
    "reference_images",
    __name__,
    url_prefix=f"{API}/reference-images",
    abp_tags=[Tag(name="reference images", description="Pictures of requests.")],
)


class ReferenceImagePath(Contract):
    reference_id: UUID


@reference_images.get("/<reference_id>/content", operation_id="getReferenceImageContent")
def get_content(path: ReferenceImagePath) -> Response:
    """Download a picture that a request of the caller brought as a reference"""
    row = services.reference_images.get_row(path.reference_id, caller=g.caller)
    return responses.stored_file(
        row.blob_key,
        etag=PurePath(row.blob_key).stem,
        media_type=ImageFormat(row.format).media_type,
        size_bytes=row.size_bytes,
        filename=f"{row.id}.{row.format}",
        may_go=True,
    )


@reference_images.get("/<reference_id>/thumbnail", operation_id="getReferenceImageThumbnail")
def get_thumbnail(path: ReferenceImagePath) -> Response:
    """Download a thumbnail (WebP)"""
    row = services.reference_images.get_row(path.reference_id, caller=g.caller)
    return responses.thumbnail(
        row.thumbnail_key, sha256=PurePath(row.thumbnail_key).stem, name=str(row.id), may_go=True
    )
