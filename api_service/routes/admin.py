"""Owners, their API keys and the audit, for keys with the scope `admin`."""

from uuid import UUID

from flask import Response, g
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import responses
from api_service.http.blueprint import ApiBlueprint
from api_service.http.urls import API
from shared.contracts.admin import (
    AuditEventView,
    AuditQuery,
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

admin = ApiBlueprint(
    "admin", __name__, url_prefix=f"{API}/admin", abp_tags=[Tag(name="admin", description="Owners and API keys.")]
)


class OwnerPath(Contract):
    owner_id: UUID


class KeyPath(Contract):
    key_id: UUID


@admin.get("/owners", operation_id="listOwners", responses={200: Page[OwnerView]})
def list_owners(query: PageQuery) -> Page[OwnerView]:
    """List owners, newest first"""
    return services.admin.list_owners(query)


@admin.post("/owners", operation_id="makeOwner", responses={200: OwnerView})
def make_owner(body: OwnerCreate) -> OwnerView:
    """Create an owner

    If an owner with this name exists, it stays as it is and is returned.
    """
    return services.admin.create_owner(body, caller=g.caller)


@admin.get("/owners/<owner_id>", operation_id="getOwner", responses={200: OwnerView})
def get_owner(path: OwnerPath) -> OwnerView:
    """Get an owner"""
    return services.admin.get_owner(path.owner_id)


@admin.patch("/owners/<owner_id>", operation_id="changeOwner", responses={200: OwnerView})
def change_owner(path: OwnerPath, body: OwnerPatch) -> OwnerView:
    """Change the quota of an owner, disable or enable it

    Fields that are left out keep their values. While an owner is disabled, all of its keys are invalid.
    """
    return services.admin.update_owner(path.owner_id, body, caller=g.caller)


@admin.post("/owners/<owner_id>/keys", operation_id="makeKey", responses={201: NewKeyView})
def make_key(path: OwnerPath, body: KeyCreate) -> Response:
    """Create an API key

    Only this response shows its secret.
    """
    return responses.created_secret(services.admin.create_key(path.owner_id, body, caller=g.caller))


@admin.get("/keys", operation_id="listKeys", responses={200: Page[KeyView]})
def list_keys(query: KeyQuery) -> Page[KeyView]:
    """List API keys, newest first

    The list includes invalid keys, and shows no secrets.
    """
    return services.admin.list_keys(query)


@admin.patch("/keys/<key_id>", operation_id="changeKey", responses={200: KeyView})
def change_key(path: KeyPath, body: KeyPatch) -> KeyView:
    """Change when an API key expires"""
    return services.admin.update_key(path.key_id, body, caller=g.caller)


@admin.post("/keys/<key_id>/rotate", operation_id="rotateKey", responses={201: NewKeyView})
def rotate_key(path: KeyPath, body: KeyRotate) -> Response:
    """Replace an API key by a new one

    The new key has the same owner and scopes. The old key expires after `overlap_s` seconds at the latest.
    """
    return responses.created_secret(services.admin.rotate_key(path.key_id, body, caller=g.caller))


@admin.post("/keys/<key_id>/revoke", operation_id="revokeKey", responses={200: KeyView})
def revoke_key(path: KeyPath) -> KeyView:
    """Revoke an API key at once"""
    return services.admin.revoke_key(path.key_id, caller=g.caller)


@admin.get("/audit", operation_id="listAudit", responses={200: Page[AuditEventView]})
def list_audit(query: AuditQuery) -> Page[AuditEventView]:
    """List the acts that are kept in the audit, newest first

    The audit has the deletions and withdrawals of images, deletions of outputs and jobs, changes of owners, quotas, API
    keys, shared collections and embedding spaces. The service never changes or deletes a row of it.
    """
    return services.admin.list_audit(query)
