"""The schemas of the OpenAPI document: the contracts in the form that generated clients read best."""

from collections.abc import Iterable
from typing import Any, Literal

from flask_openapi3.utils import get_model_schema
from pydantic import BaseModel

from shared.contracts.bulks import BulkGenerateItem, BulkHeader, BulkManifestLine, BulkRagGenerateItem
from shared.contracts.common import Problem
from shared.contracts.generation import DryRunView
from shared.contracts.images import ImageDescription
from shared.contracts.search import SearchRequest

SCHEMAS = "#/components/schemas/"
OF_ANSWERS = (DryRunView, BulkManifestLine)
OF_REQUESTS = (ImageDescription, SearchRequest, BulkHeader, BulkGenerateItem, BulkRagGenerateItem)
"""No operation's signature names these, or those of `OF_ANSWERS`: they are one of several, or lines of JSON Lines."""

Schema = dict[str, Any]


def complete(components: dict[str, Schema]) -> None:
    """Add what no route's signature names, and say once what requests and answers share."""
    components.pop("ValidationErrorModel", None)  # flask_openapi3's own
    _add(components, OF_ANSWERS, "serialization")
    # After the answers: what both hold, such as a filter, may be left out of a request. A problem leaves out, too.
    _add(components, (*OF_REQUESTS, Problem), "validation")
    components["SubmitAnswer"] = {
        "description": "The job, or for a `dry_run` what would run.",
        "anyOf": [{"$ref": f"{SCHEMAS}JobView"}, {"$ref": f"{SCHEMAS}DryRunView"}],
    }


def without_null(schema: Schema) -> Schema:
    """The schema of a query parameter or a form field: it may be left out, but text has no way to say null."""
    if "anyOf" not in schema:
        return schema
    choices = [choice for choice in schema["anyOf"] if choice != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    if "default" in rest and rest["default"] is None:
        del rest["default"]
    return {**choices[0], **rest} if len(choices) == 1 else {"anyOf": choices, **rest}


def folded(node: Any) -> Any:
    """The same with `type: [x, "null"]` for Pydantic's `anyOf` of x and null.

    OpenAPI Generator 7.26 takes `anyOf`s of one type for one and the same schema, and prints the description of one
    of them beside all others. It writes a default of null as the name `null`; that is what leaving out means anyway.
    """
    if isinstance(node, list):
        return [folded(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {name: folded(value) for name, value in node.items()}
    choices = node.get("anyOf", ())
    if len(choices) != 2 or choices[1] != {"type": "null"} or not isinstance(choices[0].get("type"), str):
        return node
    rest = {name: value for name, value in node.items() if name != "anyOf" and (name, value) != ("default", None)}
    return {**choices[0], **rest, "type": [choices[0]["type"], "null"]}


def form_fields(model: type[BaseModel]) -> Schema:
    """The properties of a multipart form that carries the contract."""
    return {name: without_null(field) for name, field in get_model_schema(model)["properties"].items()}


def _add(
    components: dict[str, Schema], models: Iterable[type[BaseModel]], mode: Literal["validation", "serialization"]
) -> None:
    for model in models:
        schema = get_model_schema(model, mode)
        components.update(schema.pop("$defs", {}))
        components[model.__name__] = schema
