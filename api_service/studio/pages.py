"""What all pages share: how they are rendered, moved on from, and what they say when something is wrong."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

import orjson
from flask import Blueprint, Response, redirect, render_template, request, url_for
from werkzeug.datastructures import MultiDict

from api_service.http import problems, requests
from api_service.http.requests import Model
from shared.settings import get_settings

PICTURES = 48
"""On one page."""
SEE_OTHER = HTTPStatus.SEE_OTHER


def pages(name: str) -> Blueprint:
    """A group of pages, which tell of errors in words."""
    group = Blueprint(name, __name__, template_folder="templates")
    group.after_request(in_words)
    return group


def is_fragment() -> bool:
    """Whether a script asks for the part of a page that changes."""
    return "X-Fragment" in request.headers


def page(template: str, **values: Any) -> Response:
    """A page, or of a fragment the block `part` alone."""
    whole = not is_fragment()
    text = render_template(
        f"studio/{template}.html",
        layout="studio/layout.html" if whole else "studio/fragment.html",
        keys_required=get_settings().security.require_api_keys,
        **values,
    )
    headers = {"Cache-Control": "no-store", "Vary": "X-Fragment, Cookie"}
    return Response(text, content_type="text/html; charset=utf-8", headers=headers)


def to(endpoint: str, **values: Any) -> Response:
    """Go there, by GET, whatever method brought one here."""
    answer = redirect(url_for(endpoint, **values), code=SEE_OTHER)
    assert isinstance(answer, Response)
    return answer


def filled(values: "MultiDict[str, str]", names: Sequence[str]) -> "MultiDict[str, str]":
    """Of a form's fields those of these names that something was written in.

    A browser sends empty ones, too, and ends lines as it did on a teletype.
    """
    sent = [(name, value.replace("\r\n", "\n")) for name, value in values.items(multi=True) if name in names]
    return MultiDict([(name, value) for name, value in sent if value.strip()])


def read(model: type[Model], values: "MultiDict[str, str]", names: Sequence[str], **defaults: Any) -> Model:
    """What a person wrote into these fields, as the contract that has them.

    Raises:
        ValidationError
    """
    return requests.form(model, defaults | requests.fields(model, filled(values, names), where="form"))


def pretty(record: Any) -> str:
    """JSON for people, not yet escaped."""
    return orjson.dumps(record, option=orjson.OPT_INDENT_2).decode()


def next_page(cursor: str) -> str:
    """The query of the address that shows what comes after this page."""
    return urlencode([*((name, value) for name, value in request.args.items() if name != "cursor"), ("cursor", cursor)])


def in_words(response: Response) -> Response:
    """Whatever went wrong, as a page; to who has not signed in, the page where that is done."""
    if response.mimetype != problems.MEDIA_TYPE:
        return response
    if response.status_code == HTTPStatus.UNAUTHORIZED and not is_fragment():
        return to("studio.sign_in")
    told = page("problem", problem=response.get_json(force=True), active="")
    response.set_data(told.get_data())
    response.headers.update(told.headers)
    return response
