"""The blueprint of every group of routes: flask_openapi3 documents it, `api_service.http.requests` reads it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from pydantic import BaseModel

from api_service.http import requests
from api_service.http import responses as respond


class Resource(APIBlueprint):
    """Routes whose arguments named `path`, `query` and `body` are contracts, and whose answers may be ones."""

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
        def view(**in_path: str) -> Response:
            arguments: dict[str, BaseModel] = {}
            if path is not None:
                arguments["path"] = requests.path(path, in_path)
            if query is not None:
                arguments["query"] = requests.query(query, request)
            if body is not None:
                arguments["body"] = requests.body(body, request)
            answer = func(**arguments)
            return respond.json(answer) if isinstance(answer, BaseModel) else answer

        return view
