"""Functions that all pages share: render pages and errors, redirect, and read forms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import orjson
from flask import Blueprint, Response, g, redirect, render_template, request, url_for
from werkzeug.datastructures import MultiDict

from api_service.http import problems, requests
from api_service.http.requests import Model
from api_service.studio.kept_form import find_kept_form
from api_service.studio.translations import _
from api_service.studio.words import plain_message
from shared.contracts.search import PlannedConcept
from shared.errors import BaseAppException, DatabaseConnectionError
from shared.settings import get_settings

IMAGES_PER_PAGE = 48
MAX_SELECTED = 500
THEMES = ("light", "dark")


def page_blueprint(name: str) -> Blueprint:
    """Create a blueprint whose errors are shown as pages."""
    blueprint = Blueprint(name, __name__, template_folder="templates")
    blueprint.after_request(render_error)
    return blueprint


def wants_fragment() -> bool:
    """Whether a script requests only the part of a page that changes."""
    return "X-Fragment" in request.headers


def render_page(template: str, **values: Any) -> Response:
    """Render a template: the whole page, or only its block `part` for a fragment."""
    theme = request.cookies.get("theme")
    text = render_template(
        f"studio/{template}.html",
        layout="studio/fragment.html" if wants_fragment() else "studio/layout.html",
        keys_required=get_settings().security.require_api_keys,
        theme=theme if theme in THEMES else None,
        errors=FormErrors.of_request(),
        **values,
    )
    headers = {"Cache-Control": "no-store", "Vary": "X-Fragment, Cookie, Accept-Language"}
    return Response(text, content_type="text/html; charset=utf-8", headers=headers)


def redirect_to(endpoint: str, **values: Any) -> Response:
    """Redirect to the page of `endpoint`; the browser requests it with GET."""
    response = redirect(url_for(endpoint, **values), code=HTTPStatus.SEE_OTHER)
    assert isinstance(response, Response)
    return response


def filled_fields(values: "MultiDict[str, str]", names: Sequence[str]) -> "MultiDict[str, str]":
    """Return the fields in `names` that are not empty, with LF at the ends of lines.

    Browsers also send empty fields, and end lines with CRLF.
    """
    sent = [(name, value.replace("\r\n", "\n")) for name, value in values.items(multi=True) if name in names]
    return MultiDict([(name, value) for name, value in sent if value.strip()])


def read_form(model: type[Model], values: "MultiDict[str, str]", names: Sequence[str], **defaults: Any) -> Model:
    """Parse the fields in `names` into a contract.

    Raises:
        ValidationError: a value is not valid.
    """
    return requests.parse_form(
        model, defaults | requests.field_values(model, filled_fields(values, names), where="form")
    )


def selected_ids(most: int = MAX_SELECTED) -> list[UUID]:
    """Return the ids of the images that the form selects, at most `most`.

    Raises:
        ValidationError: it selects none or too many, or an id is not valid.
    """
    try:
        selected = [UUID(each) for each in dict.fromkeys(request.form.getlist("selected"))]
    except ValueError:
        raise problems.field_error("form.selected", "uuid_parsing", _("Must be the id of an image.")) from None
    if not 1 <= len(selected) <= most:
        raise problems.field_error("form.selected", "length", _("Select 1 to %(most)s images first.", most=most))
    return selected


def tags_text(tags: Sequence[str]) -> str:
    """Return tags as a form's field shows them: between commas, or as JSON if a tag has a comma."""
    text = ", ".join(tags)
    return text if requests.split_tags([text]) == list(tags) else orjson.dumps(tags).decode()


def pretty_json(record: Any) -> str:
    """Return indented JSON, not escaped for HTML."""
    return orjson.dumps(record, option=orjson.OPT_INDENT_2).decode()


# --- errors -------------------------------------------------------------------------------------------------------


class FormErrors:
    """The problem of the form that was sent. A template takes the messages of each field, and shows the rest once."""

    def __init__(self, problem: dict[str, Any] | None) -> None:
        self.problem = problem
        self._left = [
            (name, plain_message(name, each["code"]) or each["message"])
            for each in (problem or {}).get("errors", [])
            for name in [_field_of(each["field"])]
        ]

    @classmethod
    def of_request(cls) -> "FormErrors":
        return cls(g.get("problem"))

    def take(self, *names: str) -> list[str]:
        """Return the messages about these fields, and count them as shown."""
        taken = [message for name, message in self._left if name in names]
        self._left = [(name, message) for name, message in self._left if name not in names]
        return taken

    def rest(self) -> list[tuple[str, str]]:
        """Return the name of the field and the message of each error that no field has shown."""
        left, self._left = self._left, []
        return left


def _field_of(path: str) -> str:
    """Return the name of the form's field for the path of an error, such as `body.filter.collection`."""
    parts = path.split(".")[1:]
    return "collection" if "collection" in parts else (parts[0] if parts else "")


def show_errors_on(page: Callable[[], Response]) -> None:
    """Show errors of this request on `page`, beside the fields of its form, which keeps everything typed."""
    g.form_page = page


def render_error(response: Response) -> Response:
    """Turn a problem into a page. Without a valid key, redirect to the page `sign_in`."""
    if response.mimetype != problems.MEDIA_TYPE:
        return response
    if response.status_code == HTTPStatus.UNAUTHORIZED and not wants_fragment():
        return redirect_to("studio.sign_in")
    g.problem = response.get_json(force=True)
    without_database = g.problem["code"] == DatabaseConnectionError.code
    kept = find_kept_form() if without_database and not wants_fragment() else None
    page = _form_page() or render_page("problem", active="", kept=kept)
    response.set_data(page.get_data())
    response.headers.update(page.headers)
    return response


def _form_page() -> Response | None:
    """Return the page of the form that was sent; `None` without one, and if the same error prevents the page."""
    page: Callable[[], Response] | None = g.get("form_page")
    # Without the database, the page would only wait for it a second time.
    if page is None or wants_fragment() or g.problem["code"] == DatabaseConnectionError.code:
        return None
    try:
        return page()
    except BaseAppException:
        return None


# --- for templates ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConceptGroup:
    """References that are shown under a concept. concept: `None` where the prompt is the only one."""

    concept: PlannedConcept | None
    references: list[Any]


def by_concept(concepts: Sequence[Any] | None, references: Sequence[Any]) -> list[ConceptGroup]:
    """Group references under the first of their concepts.

    concepts, references: contracts, or the JSON of a record. Records of releases before concepts have neither.
    """
    planned = [PlannedConcept.model_validate(each, from_attributes=True, extra="ignore") for each in concepts or []]
    if len(planned) < 2:
        return [ConceptGroup(None, list(references))] if references else []
    first = [(_concepts_of(each)[:1], each) for each in references]
    groups = [ConceptGroup(each, [shown for texts, shown in first if texts == [each.text]]) for each in planned]
    texts = {each.text for each in planned}
    others = [shown for named, shown in first if not texts.intersection(named)]
    return [*groups, ConceptGroup(None, others)] if others else groups


def _concepts_of(reference: Any) -> list[str]:
    texts: list[str] = reference.get("concepts", []) if isinstance(reference, dict) else reference.concepts
    return texts


def next_page_query(cursor: str) -> str:
    """Return the query string of the next page: the current one with another cursor."""
    return urlencode([*((name, value) for name, value in request.args.items() if name != "cursor"), ("cursor", cursor)])
