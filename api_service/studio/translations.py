"""Studio's texts in the reader's language.

Code and templates hold the texts in English, in calls of `_`. `make texts` collects them in the catalogue
`locale/studio.pot`. A compiled translation of it, such as `locale/de/LC_MESSAGES/studio.mo`, serves all browsers that
ask for its language. Sentences of the API, such as errors and reasons, are shown as the API writes them.
"""

from functools import cache
from gettext import NullTranslations, translation
from pathlib import Path
from typing import Any

from flask import Flask, g, request

DOMAIN = "studio"
LOCALE = Path(__file__).with_name("locale")
SOURCE_LANGUAGE = "en"


def register(app: Flask) -> None:
    """Translate the texts of templates: `_`, `ngettext` and `trans`."""
    app.jinja_env.add_extension("jinja2.ext.i18n")
    app.jinja_env.install_gettext_callables(  # type: ignore[attr-defined] # the extension adds it
        lambda message: _translations().gettext(message),
        lambda singular, plural, number: _translations().ngettext(singular, plural, number),
        newstyle=True,
    )
    app.add_template_global(language)


@cache
def languages() -> list[str]:
    """Return the languages of the catalogue and of its translations, by their codes."""
    translated = [file.parent.parent.name for file in LOCALE.glob(f"*/LC_MESSAGES/{DOMAIN}.mo")]
    return [SOURCE_LANGUAGE, *sorted(translated)]


def language() -> str:
    """Return the language of this request's page: the first that the browser asks for, else English."""
    return request.accept_languages.best_match(languages(), default=SOURCE_LANGUAGE)


def _translations() -> NullTranslations:
    if "translations" not in g:
        g.translations = translation(DOMAIN, LOCALE, [language()], fallback=True)
    translations: NullTranslations = g.translations
    return translations


def mark(message: str) -> str:
    """Return the text as it is. The catalogue gets it, and `_` translates it where it is used."""
    return message


def _(message: str, **values: Any) -> str:
    """Translate a text, and insert the values that it names."""
    return _translations().gettext(message) % values
