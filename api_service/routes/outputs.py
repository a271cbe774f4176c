"""Routes of outputs, the generated images: list, read, replay, remember and delete."""

from uuid import UUID

from flask import Response, current_app, g
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import responses
from api_service.http.blueprint import ApiBlueprint
from api_service.http.urls import API
from api_service.routes.generation import idempotency_key, submit_response
from shared.contracts.common import Contract, ImageFormat, Page
from shared.contracts.images import ImageView
from shared.contracts.jobs import JobView, OutputView
from shared.contracts.outputs import OutputPatch, OutputQuery, RememberRequest

outputs = ApiBlueprint(
    "outputs",
    __name__,
    url_prefix=f"{API}/generations",
    abp_tags=[Tag(name="outputs", description="Generated images.")],
)


class OutputPath(Contract):
    generation_id: UUID


@outputs.get("", operation_id="listGenerations", responses={200: Page[OutputView]})
def list_generations(query: OutputQuery) -> Page[OutputView]:
    """List the caller's generated images, newest first"""
    return services.outputs.list_page(query, caller=g.caller)


@outputs.get("/<generation_id>", operation_id="getGeneration", responses={200: OutputView})
def get_generation(path: OutputPath) -> OutputView:
    """Get a generated image, with all data that determined its pixels"""
    return services.outputs.get(path.generation_id, caller=g.caller)


@outputs.patch("/<generation_id>", operation_id="changeGeneration", responses={200: OutputView})
def change_generation(path: OutputPath, body: OutputPatch) -> OutputView:
    """Mark a generated image as a favourite, or end that

    `GET /generations?favourite=true` lists the favourites.
    """
    return services.outputs.change(path.generation_id, body, caller=g.caller)


@outputs.get("/<generation_id>/content", operation_id="getGenerationContent")
def get_content(path: OutputPath) -> Response:
    """Download the file, which contains its provenance record"""
    row = services.outputs.get_row(path.generation_id, caller=g.caller)
    return responses.stored_file(
        row.blob_key,
        etag=row.sha256,
        media_type=ImageFormat(row.format).media_type,
        size_bytes=row.size_bytes,
        filename=f"{row.id}.{row.format}",
        may_go=True,
    )


@outputs.get("/<generation_id>/thumbnail", operation_id="getGenerationThumbnail")
def get_thumbnail(path: OutputPath) -> Response:
    """Download a thumbnail (WebP)"""
    row = services.outputs.get_row(path.generation_id, caller=g.caller)
    return responses.thumbnail(row.thumbnail_key, sha256=row.sha256, name=str(row.id), may_go=True)


@outputs.post("/<generation_id>/replay", operation_id="replayGeneration", responses={202: JobView})
def replay_generation(path: OutputPath) -> Response:
    """Draw an output again from its record, as a new job, and compare

    `replay` of the new output has the verdict (`identical`, `within_tolerance` or `different`) and the inputs that have
    changed since. Answers like `POST /generate`.
    """
    return submit_response(services.generation.replay(path.generation_id, caller=g.caller, key=idempotency_key()))


@outputs.post(
    "/<generation_id>/remember", operation_id="rememberGeneration", responses={201: ImageView, 200: ImageView}
)
def remember_generation(path: OutputPath, body: RememberRequest) -> Response:
    """Add a generated image to the corpus

    The output's file becomes an image of the collection, as if it were uploaded. Its attribute `generation_id` has the
    id of the output. The body may be left out. The answer is 200 with the existing image if the collection already has
    it. The key needs the scopes `generate` and `corpus:write`.
    """
    remembered = services.outputs.remember(
        path.generation_id,
        body,
        caller=g.caller,
        decoder=current_app.extensions["decoder"],
        key=idempotency_key(),
    )
    headers = {"Idempotent-Replayed": "true"} if remembered.already_answered else None
    return responses.json(remembered.image, 201 if remembered.created else 200, headers)


@outputs.delete("/<generation_id>", operation_id="deleteGeneration", responses={204: None})
def delete_generation(path: OutputPath) -> Response:
    """Delete a generated image

    Its job stays.
    """
    services.outputs.delete(path.generation_id, caller=g.caller)
    return responses.no_content()
