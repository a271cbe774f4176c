"""Studio: the service as pages, for people, made of the verbs that the API has.

Every page works without a script. `static/studio.js` spares leaving them: a part of a page is asked for by the header
`X-Fragment`.
"""

from flask import Flask

from api_service.studio.corpus import studio_corpus
from api_service.studio.generation import studio_generation
from api_service.studio.pages import next_page
from api_service.studio.search import studio_search
from api_service.studio.sign_in import studio

PAGES = (studio, studio_generation, studio_search, studio_corpus)


def register(app: Flask) -> None:
    for pages in PAGES:
        app.register_blueprint(pages)
    app.add_template_global(next_page)
