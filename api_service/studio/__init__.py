"""Studio: the service as pages, for people, made of the verbs that the API has.

Every page works without a script. `static/studio.js` spares leaving them: a part of a page is asked for by the header
`X-Fragment`.
"""

from flask import Flask, Response, request

from api_service.studio.corpus import studio_corpus
from api_service.studio.generation import studio_generation
from api_service.studio.pages import in_words, next_page, pretty
from api_service.studio.search import studio_search
from api_service.studio.sign_in import studio

PAGES = (studio, studio_generation, studio_search, studio_corpus)


def register(app: Flask) -> None:
    for pages in PAGES:
        app.register_blueprint(pages)
    app.add_template_global(next_page)
    app.add_template_filter(pretty)
    app.after_request(_lost)


def _lost(response: Response) -> Response:
    """An address that is none, asked for by a person; programs, which do not ask for HTML, get what they expect."""
    asked_by_person = "text/html" in request.headers.get("Accept", "") and not request.path.startswith("/api/")
    return in_words(response) if request.blueprint is None and asked_by_person else response
