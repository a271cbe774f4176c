"""Routes that search the corpus."""

from flask import Response, current_app, g, request
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import multipart, requests, responses
from api_service.http.blueprint import ApiBlueprint
from api_service.http.urls import API
from shared.contracts.search import RagSearchQuery, RagSearchResponse, SearchRequest, SearchResponse

search = ApiBlueprint(
    "search", __name__, url_prefix=API, abp_tags=[Tag(name="search", description="Search the corpus.")]
)


@search.post("/search", operation_id="search", responses={200: SearchResponse})
def search_images() -> Response:
    """Find images by text, by an image, or by both

    Send JSON, or multipart with the image as a file and the other fields as form fields.
    """
    if multipart.is_multipart(request):
        search_request = multipart.search_request(request)
    else:
        search_request = requests.parse_json_body(SearchRequest, request)
    response = services.search.search_images(search_request, caller=g.caller, decoder=current_app.extensions["decoder"])
    return responses.json_bytes(response)


@search.get("/rag/search", operation_id="ragSearch", responses={200: RagSearchResponse})
def rag_search(query: RagSearchQuery) -> RagSearchResponse:
    """Show the references that `POST /rag/generate` would use for a prompt

    The answer has the weight of each reference and the reason for it. To pin exactly these references, pass the ids of
    the used ones as `reference_ids`.
    """
    return services.search.plan_references(query, caller=g.caller)
