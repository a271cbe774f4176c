"""The blueprint of all API routes. flask_openapi3 documents them; `api_service.http.requests` parses their requests."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.types import ParametersTuple
from flask_openapi3.utils import parse_parameters
from pydantic import BaseModel

from api_service.http import requests
from api_service.http.responses import json
from shared.contracts.common import Contract


class NoQuery(Contract):
    """The query of a route that has none. So a field there, such as `dry_run` of a body, is refused and not ignored."""


class ApiBlueprint(APIBlueprint):
    """Passes `path`, `query` and `body` to each route as the contracts that it declares.

    A contract that the route returns is sent as JSON.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._undescribed: list[Callable[[], object]] = []

    def _collect_openapi_info(self, rule: str, func: Callable[..., Any], **options: Any) -> ParametersTuple:
        # The schemas of all contracts took a third of the API's import. Only the OpenAPI document needs them.
        self._undescribed.append(partial(super()._collect_openapi_info, rule, func, **options))
        return parse_parameters(func, doc_ui=False)

    def describe(self) -> None:
        """Fill `paths`, `tags` and `components_schemas` with the description of the routes."""
        while self._undescribed:
            self._undescribed.pop(0)()

    @staticmethod
    def create_view_func(
        func: Callable[..., Any],
        header: type[BaseModel] | None,
        cookie: type[BaseModel] | None,
        path: type[BaseModel] | None,
        query: type[BaseModel] | None,
        form: type[BaseModel] | None,
        body: type[BaseModel] | None,
        raw: type[BaseModel] | None,
        view_class: Any = None,
        view_kwargs: dict[Any, Any] | None = None,
        responses: Any = None,
        validate_response: bool | None = None,
    ) -> Callable[..., Response]:
        @wraps(func)
        def view(**path_values: str) -> Response:
            arguments: dict[str, BaseModel] = {}
            if path is not None:
                arguments["path"] = requests.parse_path(path, path_values)
            sent_query = requests.parse_query(query or NoQuery, request)
            if query is not None:
                arguments["query"] = sent_query
            if body is not None:
                arguments["body"] = requests.parse_json_body(body, request)
            result = func(**arguments)
            return json(result) if isinstance(result, BaseModel) else result

        return view
