"""A form that was sent while the database does not answer. The error page keeps its values, and can send them again."""

import re
from dataclasses import dataclass

from flask import request
from werkzeug.exceptions import HTTPException

from api_service.http.auth import from_own_page
from shared.errors import BaseAppException

MAX_BYTES = 2**20
FIELDS_WITHOUT_WORDS = re.compile(r"(once|pin|use|planned|avoid_ids|selected|from|from_output)|.+\..+")
"""Fields that a person did not type."""


@dataclass(frozen=True)
class KeptForm:
    """The values of a form."""

    fields: list[tuple[str, str]]
    typed: list[tuple[str, str]]
    """Names and values of the fields that a person filled in."""
    file_fields: list[str]
    """Fields whose files must be chosen again: a page cannot set them."""


def find_kept_form() -> KeptForm | None:
    """Return the form of this request; `None` without a form, or if it is large, secret or of another page."""
    # The forms of the blueprint `studio` have a secret. A page of another origin must not offer its own values here.
    if request.method != "POST" or request.blueprint == "studio" or not from_own_page(request):
        return None
    if not 0 < (request.content_length or 0) <= MAX_BYTES:
        return None
    try:
        fields, files = list(request.form.items(multi=True)), request.files
    except (BaseAppException, HTTPException):  # the body did not arrive
        return None
    typed = [(name, value) for name, value in fields if not FIELDS_WITHOUT_WORDS.fullmatch(name)]
    return KeptForm(
        fields,
        typed=[(name, value) for name, value in typed if value.strip()],
        file_fields=[name for name in files if files[name].filename],
    )
