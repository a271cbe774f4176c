"""Studio's pages of bulks: list, start from a table, follow, pause, cancel, and retry what failed."""

import csv
import io
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import orjson
from flask import Response, g, request
from werkzeug.datastructures import FileStorage

from api_service import services
from api_service.http import problems
from api_service.services.bulk_lines import BulkBody
from api_service.studio.generation import form_key
from api_service.studio.pages import filled_fields, page_blueprint, read_form, redirect_to, render_page, show_errors_on
from api_service.studio.translations import _
from shared.contracts.bulks import BulkItemQuery, BulkQuery, ItemState, LineQuery
from shared.contracts.outputs import OutputQuery
from shared.errors import ResourceNotFoundError
from shared.settings import get_settings

studio_bulks = page_blueprint("studio_bulks")

CONTACT_SHEET = 96
"""Latest images that are shown on the page of a bulk."""
ERRORS_SHOWN = 50
FAILED_SHOWN = 50
NUMBERS = ("num_images", "seed", "width", "height", "num_inference_steps", "quality", "similar_examples_count")
DECIMALS = ("guidance_scale", "strength", "ip_adapter_scale", "min_similarity")
"""Columns whose cells are numbers in the request."""


@studio_bulks.get("/bulks")
def bulks() -> Response:
    return _list()


def _list() -> Response:
    query = read_form(BulkQuery, request.args, ("cursor",))
    return render_page("bulks", active="bulks", bulks=services.bulks.list_page(query, caller=g.caller))


@studio_bulks.post("/bulks")
def start() -> Response:
    """Start a bulk from a CSV file, or from prompts, one per line."""
    show_errors_on(_list)
    header = {"bulk": dict(filled_fields(request.form, ("name", "on_invalid")).items())}
    lines = [header, *_items(request.files.get("table"), request.form.get("prompts", ""))]
    if len(lines) == 1:
        raise problems.field_error("form.prompts", "missing", _("Choose a CSV file, or write one prompt per line."))
    data = b"".join(orjson.dumps(line) + b"\n" for line in lines)
    body = BulkBody(io.BytesIO(data), content_length=len(data), settings=get_settings().bulks)
    sent = services.bulks.send(body, may_complete=True, caller=g.caller, key=form_key())
    return redirect_to("studio_bulks.bulk", bulk_id=sent.view.id)


def _items(table: FileStorage | None, prompts: str) -> Iterator[dict[str, Any]]:
    """Yield the items of a table, whose columns are fields of the request, and of the prompts.

    Raises:
        ValidationError: the table is not CSV in UTF-8, or has no column `prompt`.
    """
    yield from ({"prompt": line.strip()} for line in prompts.splitlines() if line.strip())
    data = table.read() if table is not None else b""
    if not data:
        return
    try:
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        if "prompt" not in (rows.fieldnames or ()):
            raise problems.field_error(
                "form.table", "missing", _("The first line must name the columns, one of them `prompt`.")
            )
        for row in rows:
            if None in row:
                raise problems.field_error(
                    "form.table",
                    "length",
                    _("Line %(number)s has more cells than there are columns.", number=rows.line_num),
                )
            if cells := {name: value.strip() for name, value in row.items() if name and value and value.strip()}:
                yield {name: _cell(name, value) for name, value in cells.items()}
    except (UnicodeDecodeError, csv.Error) as error:
        raise problems.field_error(
            "form.table", "csv", _("This is not a CSV file in UTF-8: %(error)s.", error=error)
        ) from None


def _cell(name: str, value: str) -> Any:
    """Return a number where the request has one. A cell that is not a number stays a text, which the bulk reports."""
    try:
        return int(value) if name in NUMBERS else float(value) if name in DECIMALS else value
    except ValueError:
        return value


@studio_bulks.get("/bulks/<uuid:bulk_id>")
def bulk(bulk_id: UUID) -> Response:
    view = services.bulks.get(bulk_id, caller=g.caller)
    failed = [
        item
        for state in (ItemState.FAILED, ItemState.DEAD, ItemState.EXPIRED)
        if getattr(view.counts, state.value)
        for item in services.bulks.list_items(
            bulk_id, BulkItemQuery(state=state, limit=FAILED_SHOWN), caller=g.caller
        ).items
    ]
    errors = (
        services.bulks.list_errors(bulk_id, LineQuery(limit=ERRORS_SHOWN), caller=g.caller).items
        if view.invalid
        else []
    )
    outputs = services.outputs.list_page(OutputQuery(bulk_id=bulk_id, limit=CONTACT_SHEET), caller=g.caller)
    return render_page("bulk", active="bulks", bulk=view, failed=failed[:FAILED_SHOWN], invalid=errors, outputs=outputs)


ACTIONS = {
    "pause": services.bulks.pause,
    "resume": services.bulks.resume,
    "cancel": services.bulks.cancel,
    "retry-failed": services.bulks.retry_failed,
}


@studio_bulks.post("/bulks/<uuid:bulk_id>/<action>")
def change(bulk_id: UUID, action: str) -> Response:
    if action not in ACTIONS:
        raise ResourceNotFoundError(_("A bulk has no such action."), action=action)
    ACTIONS[action](bulk_id, caller=g.caller)
    return redirect_to("studio_bulks.bulk", bulk_id=bulk_id)
