"""Studio: web pages for people, with the same use cases as the API.

Every page works without a script. `static/studio.js` updates pages in place: with the header `X-Fragment`, a page sends
only the part that changes.
"""

from uuid import uuid4

from flask import Flask, Response, request

from api_service.studio import translations
from api_service.studio.bulks import studio_bulks
from api_service.studio.collections import studio_collections
from api_service.studio.corpus import studio_corpus
from api_service.studio.gallery import studio_gallery
from api_service.studio.generation import studio_generation
from api_service.studio.pages import by_concept, next_page_query, pretty_json, render_error, tags_text
from api_service.studio.queue import studio_queue
from api_service.studio.search import studio_search
from api_service.studio.sign_in import studio
from api_service.studio.words import field_label, mode_words, word

BLUEPRINTS = (
    *(studio, studio_generation, studio_gallery, studio_queue, studio_bulks),
    *(studio_search, studio_corpus, studio_collections),
)


def register(app: Flask) -> None:
    for blueprint in BLUEPRINTS:
        app.register_blueprint(blueprint)
    translations.register(app)
    app.add_template_global(next_page_query)
    app.add_template_global(by_concept)
    app.add_template_global(lambda: uuid4().hex, "random_key")
    app.add_template_filter(pretty_json)
    app.add_template_filter(mode_words)
    app.add_template_filter(word)
    app.add_template_filter(field_label)
    app.add_template_filter(tags_text)
    app.after_request(_render_not_found)


def _render_not_found(response: Response) -> Response:
    """Turn the error of an unknown path into a page for browsers. Programs, which do not accept HTML, get problems."""
    from_browser = "text/html" in request.headers.get("Accept", "") and not request.path.startswith("/api/")
    return render_error(response) if request.blueprint is None and from_browser else response
