"""The OpenAPI document and Swagger UI: complete, correct, and usable without a network."""

import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from openapi_spec_validator import validate

from api_service.http.problems import HTTP_CODES
from ops.local.stack import REPOSITORY
from shared.errors import BaseAppException
from tests.integration.conftest import API, Client

ON_EVERY_ANSWER = {
    "Content-Security-Policy",
    "Cross-Origin-Resource-Policy",
    "Referrer-Policy",
    "X-Content-Type-Options",
    "X-Frame-Options",
}
"""Headers for browsers; clients of the API do not need them."""
METHODS = ("get", "post", "patch", "delete", "put")


@pytest.fixture
def document(client: Client) -> dict[str, Any]:
    answer = client.get(f"{API}/openapi.json")
    assert answer.status_code == 200
    return dict(answer.json)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for route, path_item in document["paths"].items():
        for method in METHODS:
            if method in path_item:
                yield method, route, path_item[method]


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_every_reference_in_the_document_resolves(document: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    for reference in set(references(document)):
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            assert part in target, reference
            target = target[part]


def test_operations_have_ids_that_a_generated_client_can_use(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids) >= 25
    assert all(re.fullmatch(r"[a-z][A-Za-z]+", name) for name in ids)
    assert all(operation["summary"] and operation["tags"] for _, _, operation in operations(document))


def test_schema_names_and_texts_are_usable_in_a_generated_client(document: dict[str, Any]) -> None:
    assert all(re.fullmatch(r"[A-Z][A-Za-z]+", name) for name in document["components"]["schemas"])
    assert "<br" not in str(document)


def test_every_field_of_a_response_schema_is_required(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in ("JobView", "JobPage", "OutputView", "BulkItemView", "StatsView", "BulkManifestLine"):
        assert set(schemas[name]["required"]) == set(schemas[name]["properties"]), name
    assert schemas["RagGenerateRequest"]["required"] == ["prompt"]
    assert "required" not in schemas["ImageFilter"], "a request may leave fields of it out"


def test_null_is_allowed_only_where_it_can_be_sent(document: dict[str, Any]) -> None:
    for _, route, operation in operations(document):
        form = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data", {"schema": {}})["schema"]
        as_text = [parameter["schema"] for parameter in operation.get("parameters", [])]
        assert "null" not in str([*as_text, form.get("properties", {})]), route
    assert document["components"]["schemas"]["ImagePatch"]["properties"]["caption"]["type"] == ["string", "null"]


def test_every_link_passes_an_id_of_its_answer_to_an_operation_on_that_id(document: dict[str, Any]) -> None:
    by_id = {operation["operationId"]: operation for _, _, operation in operations(document)}
    linked = set()
    for source in by_id.values():
        for status, response in source["responses"].items():
            for name, link in response.get("links", {}).items():
                where = (source["operationId"], status, name)
                target = by_id[link["operationId"]]
                taken = {parameter["name"]: parameter for parameter in target["parameters"]}
                assert set(link["parameters"]) <= set(taken), where
                assert {name for name, each in taken.items() if each.get("required")} <= set(link["parameters"]), where
                for expression in link["parameters"].values():
                    answer = response["content"]["application/json"]["schema"]
                    assert schema_at(document, answer, expression.removeprefix("$response.body#")), where
                linked.add(link["operationId"])
    takes_an_id = {operation["operationId"] for _, route, operation in operations(document) if "{" in route}
    assert takes_an_id <= linked, "each operation on an id is linked from an answer that has the id"


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].split("/")[-1]]
    return schema


def schema_at(document: dict[str, Any], schema: dict[str, Any], pointer: str) -> dict[str, Any]:
    """The schema of the value that a JSON pointer into an instance of `schema` selects."""
    for part in pointer.split("/")[1:]:
        schema = resolved(document, schema)
        schema = schema["items"] if part.isdigit() else schema["properties"][part]
    return schema


def test_the_document_describes_exactly_the_routes_of_the_api(client: Client, document: dict[str, Any]) -> None:
    served = {
        (method.lower(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.rule.startswith(API) and rule.endpoint != "document"
    }
    assert {(method, route) for method, route, _ in operations(document)} == served


def test_every_endpoint_of_the_first_version_is_there(document: dict[str, Any]) -> None:
    wanted = {
        ("get", "/health"),
        ("post", "/search"),
        ("post", "/generate"),
        ("post", "/rag/generate"),
        ("get", "/rag/search"),
        ("post", "/upload"),
        ("get", "/images"),
        ("get", "/images/{image_id}"),
        ("delete", "/images/{image_id}"),
        ("get", "/stats"),
    }
    assert {(method, API + route) for method, route in wanted} <= {(m, r) for m, r, _ in operations(document)}


def test_errors_are_described_once_and_referenced_by_every_operation(document: dict[str, Any]) -> None:
    described = document["components"]["responses"]
    for method, route, operation in operations(document):
        errors = {status: answer for status, answer in operation["responses"].items() if status[0] in "45d"}
        assert "500" in errors, route
        for status, answer in errors.items():
            health = "health" in route and status == "503"
            assert health or answer["$ref"].split("/")[-1] in described, (method, route, status)
        if operation.get("requestBody"):
            assert {"400", "413", "415", "422"} <= set(errors), route
        if "{" in route:
            assert "404" in errors
    for response in described.values():
        assert response["content"]["application/problem+json"]["schema"]["$ref"].endswith("/Problem")


def test_every_answer_is_described_with_its_headers(client: Client, document: dict[str, Any]) -> None:
    plain = {"Content-Type", "Content-Length", "Cache-Control", "Date"}  # part of the answer's content, or of HTTP

    def described(method: str, route: str, status: int) -> set[str]:
        response = document["paths"][API + route][method]["responses"][str(status)]
        while "$ref" in response:
            response = document["components"]["responses"][response["$ref"].split("/")[-1]]
        return set(response["headers"])

    job_id = client.post(f"{API}/generate", json={"prompt": "x"}).json["id"]
    for method, route, sent, body in [
        ("post", "/generate", "/generate", {"prompt": "x"}),
        ("post", "/generate", "/generate", {"prompt": ""}),
        ("post", "/generate", "/generate", {"prompt": "x", "dry_run": True}),
        ("get", "/jobs", "/jobs", None),
        ("get", "/jobs/{job_id}", f"/jobs/{job_id}", None),
        ("get", "/jobs/{job_id}", f"/jobs/{uuid4()}", None),
        ("post", "/jobs/{job_id}/cancel", f"/jobs/{job_id}/cancel", None),
        ("post", "/jobs/{job_id}/cancel", f"/jobs/{job_id}/cancel", None),
        ("post", "/jobs/{job_id}/retry", f"/jobs/{job_id}/retry", None),
        ("delete", "/jobs/{job_id}", f"/jobs/{job_id}", None),
        ("post", "/webhooks/secret/rotate", "/webhooks/secret/rotate", None),
        ("post", "/search", "/search", {"query": "x"}),
        ("get", "/health", "/health", None),
    ]:
        answer = client.open(API + sent, method=method.upper(), json=body)
        undescribed = (
            set(answer.headers.keys()) - described(method, route, answer.status_code) - plain - ON_EVERY_ANSWER
        )
        assert not undescribed, (method, sent, answer.status_code)


def test_the_examples_in_the_document_are_accepted(client: Client, document: dict[str, Any]) -> None:
    for route, status in [("/generate", 202), ("/rag/generate", 202), ("/search", 503)]:
        content = document["paths"][API + route]["post"]["requestBody"]["content"]
        answer = client.post(API + route, json=content["application/json"]["example"])
        assert answer.status_code == status, answer.text


def test_swagger_ui_needs_nothing_from_the_network(client: Client) -> None:
    start = client.get("/docs", follow_redirects=True)
    assert start.status_code == 200
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", start.text)
    assert "openapi.json" in start.text
    for asset in re.findall(r"""(?:src|href)="([^"]+)""", start.text):
        answer = client.get(f"/docs/{asset}")
        assert answer.status_code == 200, asset
        answer.close()


def test_without_docs_there_is_no_swagger_ui(settings: Any) -> None:
    from api_service.app import create_app

    closed = settings.model_copy(update={"security": settings.security.model_copy(update={"docs_enabled": False})})
    client = create_app(closed).test_client()
    assert client.get("/docs").status_code == 404
    assert client.get("/docs/swagger").status_code == 404


def test_an_unexpected_error_shows_no_details(client: Client) -> None:
    def crash() -> None:
        raise RuntimeError("secret detail")

    client.application.view_functions["document"] = crash
    answer = client.get(f"{API}/openapi.json")
    assert (answer.status_code, answer.json["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_the_page_on_errors_lists_every_code_with_its_status() -> None:
    def tree(kind: type[BaseAppException]) -> Iterator[type[BaseAppException]]:
        yield kind
        for child in kind.__subclasses__():
            yield from tree(child)

    ours = {kind.code: kind.status for kind in tree(BaseAppException) if kind.__module__ == "shared.errors"}
    page = (REPOSITORY / "docs" / "api.md").read_text()
    listed = {code: int(status) for code, status in re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE)}
    assert listed == {code: int(status) for status, code in HTTP_CODES.items()} | ours
