"""Asking the corpus."""

from flask import Response, current_app, g, request
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import multipart, requests, responses
from api_service.http.blueprint import Resource
from api_service.services.views import API
from shared.contracts.search import RagSearchQuery, RagSearchResponse, SearchRequest, SearchResponse

search = Resource(
    "search", __name__, url_prefix=API, abp_tags=[Tag(name="search", description="Ask what is remembered.")]
)


@search.post("/search", operation_id="search", responses={200: SearchResponse})
def search_images() -> Response:
    """Find images by text, by an image, or by both

    As JSON, or as multipart with the image as a file and the JSON body's fields as form fields.
    """
    wanted = (
        multipart.search_request(request) if multipart.is_multipart(request) else requests.body(SearchRequest, request)
    )
    found = services.search.images_like(wanted, caller=g.caller, decoder=current_app.extensions["decoder"])
    return responses.encoded(found)


@search.get("/rag/search", operation_id="ragSearch", responses={200: RagSearchResponse})
def rag_search(query: RagSearchQuery) -> RagSearchResponse:
    """Show what `POST /rag/generate` would use for a prompt, and why

    Pass the ids of the used references as `reference_ids` to pin exactly these.
    """
    return services.search.references_for(query, caller=g.caller)
