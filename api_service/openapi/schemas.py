"""Schemas of the OpenAPI document: the contracts, in a form that client generators handle well."""

from collections.abc import Iterable
from typing import Any, Literal

from flask_openapi3.utils import get_model_schema
from pydantic import BaseModel

from shared.contracts.bulks import BulkGenerateItem, BulkHeader, BulkManifestLine, BulkRagGenerateItem
from shared.contracts.common import Problem
from shared.contracts.generation import DryRunView, RagGenerateRequest
from shared.contracts.images import ImageDescription
from shared.contracts.search import SearchRequest

SCHEMA_REF_PREFIX = "#/components/schemas/"
RESPONSE_SCHEMAS = (DryRunView, BulkManifestLine)
REQUEST_SCHEMAS = (
    ImageDescription,
    SearchRequest,
    RagGenerateRequest,
    BulkHeader,
    BulkGenerateItem,
    BulkRagGenerateItem,
)
"""Like `RESPONSE_SCHEMAS`, contracts that no route's signature names: alternatives, form parts and JSON Lines."""

Schema = dict[str, Any]


def add_unnamed_schemas(components: dict[str, Schema]) -> None:
    """Add the contracts that no route's signature names."""
    components.pop("ValidationErrorModel", None)  # flask_openapi3's own
    _add_schemas(components, RESPONSE_SCHEMAS, "serialization")
    # Requests come last, and replace a schema that both use, such as a filter: requests may leave out its fields. A
    # problem, too, may leave out fields.
    _add_schemas(components, (*REQUEST_SCHEMAS, Problem), "validation")
    components["SubmitAnswer"] = {
        "description": "The job, or the resolved request of a `dry_run`.",
        "anyOf": [{"$ref": f"{SCHEMA_REF_PREFIX}JobView"}, {"$ref": f"{SCHEMA_REF_PREFIX}DryRunView"}],
    }


def without_null(schema: Schema) -> Schema:
    """Remove `null` from the schema of a query parameter or form field, which is text and cannot be null."""
    if "anyOf" not in schema:
        return schema
    choices = [choice for choice in schema["anyOf"] if choice != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    if "default" in rest and rest["default"] is None:
        del rest["default"]
    return {**choices[0], **rest} if len(choices) == 1 else {"anyOf": choices, **rest}


def with_nullable_types(node: Any) -> Any:
    """Replace Pydantic's `anyOf` of x and null by `type: [x, "null"]`, in all schemas within `node`.

    OpenAPI Generator 7.26 treats all `anyOf`s of one type as one schema. It then prints the description of one field
    beside all others. Defaults of null are dropped, because the generator writes them as the name `null`.
    """
    if isinstance(node, list):
        return [with_nullable_types(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {name: with_nullable_types(value) for name, value in node.items()}
    choices = node.get("anyOf", ())
    if len(choices) != 2 or choices[1] != {"type": "null"} or not isinstance(choices[0].get("type"), str):
        return node
    rest = {name: value for name, value in node.items() if name != "anyOf" and (name, value) != ("default", None)}
    return {**choices[0], **rest, "type": [choices[0]["type"], "null"]}


def form_fields(model: type[BaseModel]) -> Schema:
    """Return the properties of a multipart form with the fields of the contract."""
    return {name: without_null(field) for name, field in get_model_schema(model)["properties"].items()}


def _add_schemas(
    components: dict[str, Schema], models: Iterable[type[BaseModel]], mode: Literal["validation", "serialization"]
) -> None:
    for model in models:
        schema = get_model_schema(model, mode)
        components.update(schema.pop("$defs", {}))
        components[model.__name__] = schema
