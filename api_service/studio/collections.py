"""Studio's pages of collections: list, create, describe, share and delete them."""

from functools import partial
from uuid import UUID

from flask import Response, g, request

from api_service import services
from api_service.http import requests
from api_service.studio.pages import filled_fields, page_blueprint, read_form, redirect_to, render_page, show_errors_on
from shared.contracts.collections import (
    Access,
    CollectionCreate,
    CollectionDefaults,
    CollectionPatch,
    CollectionQuery,
    GrantRequest,
)
from shared.contracts.common import Contract, Name, PageQuery
from shared.contracts.search import SearchMode

studio_collections = page_blueprint("studio_collections")


class OwnerForm(Contract):
    """The name of an owner who gets access, or loses it."""

    owner: Name


GRANTS_SHOWN = 100


@studio_collections.get("/collections")
def collections() -> Response:
    return _list()


def _list() -> Response:
    page = services.collections.list_page(read_form(CollectionQuery, request.args, ("cursor",)), caller=g.caller)
    may_create = "corpus:write" in g.caller.scopes and g.caller.collection_ids is None
    return render_page("collections", active="collections", collections=page, may_create=may_create)


@studio_collections.post("/collections")
def create() -> Response:
    show_errors_on(_list)
    body = read_form(CollectionCreate, request.form, ("name", "description"))
    view = services.collections.create(body, caller=g.caller)
    return redirect_to("studio_collections.collection", collection_id=view.id)


@studio_collections.get("/collections/<uuid:collection_id>")
def collection(collection_id: UUID) -> Response:
    return _one(collection_id)


def _one(collection_id: UUID) -> Response:
    view = services.collections.get(collection_id, caller=g.caller)
    grants = None
    if view.access is Access.OWNER and "corpus:write" in g.caller.scopes:
        grants = services.collections.list_grants(collection_id, PageQuery(limit=GRANTS_SHOWN), caller=g.caller)
    modes = [mode.value for mode in SearchMode]
    return render_page("collection", active="collections", collection=view, grants=grants, modes=modes)


@studio_collections.post("/collections/<uuid:collection_id>")
def change(collection_id: UUID) -> Response:
    show_errors_on(partial(_one, collection_id))
    values = filled_fields(request.form, ("name", "description"))
    defaults = read_form(CollectionDefaults, request.form, ("min_similarity", "k", "mode"))
    patch = requests.parse_form(
        CollectionPatch,
        {"name": values.get("name"), "description": values.get("description"), "defaults": defaults},
    )
    services.collections.update(collection_id, patch, caller=g.caller)
    return redirect_to("studio_collections.collection", collection_id=collection_id)


@studio_collections.post("/collections/<uuid:collection_id>/share")
def share(collection_id: UUID) -> Response:
    show_errors_on(partial(_one, collection_id))
    owner = requests.parse_form(OwnerForm, filled_fields(request.form, ("owner",))).owner
    body = read_form(GrantRequest, request.form, ("access",))
    services.collections.share(collection_id, owner, body, caller=g.caller)
    return redirect_to("studio_collections.collection", collection_id=collection_id)


@studio_collections.post("/collections/<uuid:collection_id>/unshare/<owner>")
def unshare(collection_id: UUID, owner: str) -> Response:
    owner = requests.parse_form(OwnerForm, {"owner": owner}).owner
    services.collections.unshare(collection_id, owner, caller=g.caller)
    return redirect_to("studio_collections.collection", collection_id=collection_id)


@studio_collections.post("/collections/<uuid:collection_id>/delete")
def delete(collection_id: UUID) -> Response:
    services.collections.delete(collection_id, caller=g.caller)
    return redirect_to("studio_collections.collections")
