"""Collections of images: create, list, describe, share and delete them."""

from uuid import UUID

from flask import Response, g
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import responses
from api_service.http.blueprint import ApiBlueprint
from api_service.http.urls import API
from shared.contracts.collections import (
    CollectionCreate,
    CollectionPatch,
    CollectionQuery,
    CollectionView,
    GrantRequest,
    GrantView,
)
from shared.contracts.common import Contract, Name, Page, PageQuery

collections = ApiBlueprint(
    "collections",
    __name__,
    url_prefix=f"{API}/collections",
    abp_tags=[Tag(name="collections", description="Collections of images, and who may use them.")],
)


class CollectionPath(Contract):
    collection_id: UUID


class GrantPath(CollectionPath):
    owner: Name


@collections.post("", operation_id="createCollection", responses={201: CollectionView})
def create(body: CollectionCreate) -> Response:
    """Create a collection

    An upload into a collection that does not exist creates it too.
    """
    view = services.collections.create(body, caller=g.caller)
    return responses.json(view, 201, {"Location": view.url})


@collections.get("", operation_id="listCollections", responses={200: Page[CollectionView]})
def list_collections(query: CollectionQuery) -> Page[CollectionView]:
    """List the collections that you may use, newest first

    These are your own, the collection `shared`, and those that other owners share with you.
    """
    return services.collections.list_page(query, caller=g.caller)


@collections.get("/<collection_id>", operation_id="getCollection", responses={200: CollectionView})
def get_collection(path: CollectionPath) -> CollectionView:
    """Get a collection"""
    return services.collections.get(path.collection_id, caller=g.caller)


@collections.patch("/<collection_id>", operation_id="changeCollection", responses={200: CollectionView})
def change_collection(path: CollectionPath, body: CollectionPatch) -> CollectionView:
    """Change the name, the description or the defaults of a collection

    Fields that are left out keep their values. `defaults` replaces all defaults. Requests, and jobs that have not
    started, do not find a collection by its old name.
    """
    return services.collections.update(path.collection_id, body, caller=g.caller)


@collections.delete("/<collection_id>", operation_id="deleteCollection", responses={204: None})
def delete_collection(path: CollectionPath) -> Response:
    """Delete a collection with all its images

    No search and no new generation uses its images from then on, and its name is free. The images are removed from
    the database in steps after the answer.
    """
    services.collections.delete(path.collection_id, caller=g.caller)
    return responses.no_content()


@collections.get("/<collection_id>/grants", operation_id="listGrants", responses={200: Page[GrantView]})
def list_grants(path: CollectionPath, query: PageQuery) -> Page[GrantView]:
    """List the owners that have access to a collection, newest first"""
    return services.collections.list_grants(path.collection_id, query, caller=g.caller)


@collections.put("/<collection_id>/grants/<owner>", operation_id="shareCollection", responses={200: GrantView})
def share(path: GrantPath, body: GrantRequest) -> GrantView:
    """Share a collection with another owner, or change the access of that owner

    `read` allows to search its images and to use them as references. `write` allows to upload, change and delete
    images too.
    """
    return services.collections.share(path.collection_id, path.owner, body, caller=g.caller)


@collections.delete("/<collection_id>/grants/<owner>", operation_id="unshareCollection", responses={204: None})
def unshare(path: GrantPath) -> Response:
    """Take the access of another owner away

    It ends at once, also for jobs that have not started.
    """
    services.collections.unshare(path.collection_id, path.owner, caller=g.caller)
    return responses.no_content()
