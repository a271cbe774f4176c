"""Owners and their API keys, for keys with the scope `admin`."""

from uuid import UUID

from flask import Response, g
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import responses
from api_service.http.blueprint import Resource
from api_service.services.views import API
from shared.contracts.admin import (
    KeyCreate,
    KeyPatch,
    KeyQuery,
    KeyRotate,
    KeyView,
    NewKeyView,
    OwnerCreate,
    OwnerPatch,
    OwnerView,
)
from shared.contracts.common import Contract, Page, PageQuery

admin = Resource(
    "admin", __name__, url_prefix=f"{API}/admin", abp_tags=[Tag(name="admin", description="Owners and API keys.")]
)


class OwnerPath(Contract):
    owner_id: UUID


class KeyPath(Contract):
    key_id: UUID


@admin.get("/owners", operation_id="listOwners", responses={200: Page[OwnerView]})
def list_owners(query: PageQuery) -> Page[OwnerView]:
    """Who there is, newest first"""
    return services.admin.owner_page(query)


@admin.post("/owners", operation_id="makeOwner", responses={200: OwnerView})
def make_owner(body: OwnerCreate) -> OwnerView:
    """Make an owner; one of that name stays as it is"""
    return services.admin.make_owner(body, caller=g.caller)


@admin.get("/owners/<owner_id>", operation_id="getOwner", responses={200: OwnerView})
def get_owner(path: OwnerPath) -> OwnerView:
    """One owner"""
    return services.admin.owner(path.owner_id)


@admin.patch("/owners/<owner_id>", operation_id="changeOwner", responses={200: OwnerView})
def change_owner(path: OwnerPath, body: OwnerPatch) -> OwnerView:
    """Give an owner a quota, disable it, enable it again

    Fields that are not given stay as they are.
    """
    return services.admin.change_owner(path.owner_id, body, caller=g.caller)


@admin.post("/owners/<owner_id>/keys", operation_id="makeKey", responses={201: NewKeyView})
def make_key(path: OwnerPath, body: KeyCreate) -> Response:
    """Make an API key; its secret is shown in this answer and never again"""
    return responses.secret(services.admin.make_key(path.owner_id, body, caller=g.caller))


@admin.get("/keys", operation_id="listKeys", responses={200: Page[KeyView]})
def list_keys(query: KeyQuery) -> Page[KeyView]:
    """Keys without their secrets, newest first, those that are no longer valid too"""
    return services.admin.key_page(query)


@admin.patch("/keys/<key_id>", operation_id="changeKey", responses={200: KeyView})
def change_key(path: KeyPath, body: KeyPatch) -> KeyView:
    """Let a key expire at another time"""
    return services.admin.change_key(path.key_id, body, caller=g.caller)


@admin.post("/keys/<key_id>/rotate", operation_id="rotateKey", responses={201: NewKeyView})
def rotate_key(path: KeyPath, body: KeyRotate) -> Response:
    """Replace a key by one that sees and may do the same; the old one stays valid for `overlap_s`"""
    return responses.secret(services.admin.rotate_key(path.key_id, body, caller=g.caller))


@admin.post("/keys/<key_id>/revoke", operation_id="revokeKey", responses={200: KeyView})
def revoke_key(path: KeyPath) -> KeyView:
    """End a key at once"""
    return services.admin.revoke_key(path.key_id, caller=g.caller)
