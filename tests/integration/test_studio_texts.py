"""Every text of Studio comes from its catalogue: a page in another language has no English words left."""

import io
import json
import re
import struct
from collections.abc import Iterator
from gettext import NullTranslations
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from api_service.studio import translations
from api_service.studio.words import MODES, WORDS
from shared.contracts.jobs import Change, JobState, Replay, ReplayVerdict
from shared.db import jobs, workers
from shared.db.tables import Job, OutputReference
from tests.factories import make_image, make_job, make_space
from tests.integration.conftest import API, Client, picture
from tests.integration.test_api_jobs import CAPABILITIES
from tests.integration.test_api_search import embed_worker, towards
from tests.integration.test_export_outputs import make_output

SAME_ORIGIN = {"Origin": "http://localhost"}
SHOWN_ATTRIBUTES = ("alt", "aria-label", "data-sure", "placeholder", "title")
WORD = re.compile(r"[a-z]{3,}", re.IGNORECASE)
NAMES = r"\b(Afterimage|UTC|LoRA|png|jpeg|webp|curl|Python|JSON|cuda|Ctrl|factory|local|red|shared|[a-z]+_[a-z_]+)\b"
"""Names of products, formats, fields and of other things of a test, which a translation keeps."""
MESSAGES = r'(?:class="field-wrong"[^>]*>|data-field="[^"]*">[^<]*: |role="alert">(?:\s*<p><b>)?|</b> · )([^⟦<]+)<'
"""Messages that the API wrote."""


class Bracketed(NullTranslations):
    """A translation that puts brackets around every word of the catalogue, and none around values and tags."""

    def gettext(self, message: str) -> str:
        parts = re.split(r"(%\(\w+\)s|%%|\{\w+\}|<[^>]*>)", message)
        return "".join(part if number % 2 or not part.strip() else f"⟦{part}⟧" for number, part in enumerate(parts))

    def ngettext(self, msgid1: str, msgid2: str, n: int) -> str:
        return self.gettext(msgid1 if n == 1 else msgid2)


class Texts(HTMLParser):
    """Collects the texts of a page that a person reads or hears."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._within: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("code", "pre", "q", "style"):
            self._within.append(tag)
        values = dict(attrs)
        self.found += [values[name] or "" for name in SHOWN_ATTRIBUTES if name in values]
        if values.get("name") == "texts":
            self.found += json.loads(values["content"] or "{}").values()

    def handle_endtag(self, tag: str) -> None:
        if self._within and tag == self._within[-1]:
            self._within.pop()

    def handle_data(self, data: str) -> None:
        if not self._within:
            self.found.append(data)


def untranslated(page: str, data: set[str]) -> list[str]:
    """The texts of the page with English words. data: strings of the API, which are not Studio's texts."""
    left = []
    for text in Texts(page).found:
        rest = re.sub(r"⟦[^⟦⟧]*⟧", " ", text)
        for each in sorted(data, key=len, reverse=True):
            rest = rest.replace(each, " ")
        rest = re.sub(rf"{NAMES}|{{\"tags.*?}}|\S*[\d/@.{{]\S*", " ", rest)
        if WORD.search(rest):
            left.append(text.strip())
    return left


def strings(value: Any) -> Iterator[str]:
    """The sentences and names in the JSON of the API, without the codes of its enums."""
    if isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)
    elif isinstance(value, str) and value not in {*WORDS, *MODES}:
        yield value


@pytest.fixture
def bracketed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translations, "translation", lambda *_args, **_options: Bracketed())


def fill(session: Session) -> dict[str, Any]:
    """Make one thing of each kind, with data in other letters than English. Return the ids of those with a page."""
    space = make_space(session)
    image = make_image(session, vector=towards(a0=1), caption="яблоко", tags=["тег"], licence="лиц", source="ист")
    make_image(session, vector=towards(a0=1, a3=0.01), caption="груша")
    make_image(session, caption=None)
    drawn, other = make_output(session, 7), make_output(session, 8)
    for each in (drawn, other):
        record = json.loads(json.dumps(each.provenance))
        record["parameters"]["prompt"] = "яблоко"
        record["model"] |= {"name": "мод", "pipeline": "П", "dtype": "т", "device": "где"}
        each.provenance = record | {"mode_reason": "почему", "embedding_space": "00"}
        job = session.get_one(Job, each.job_id)
        job.parameters = job.parameters | {"prompt": "яблоко"}
    session.execute(update(OutputReference).values(image_id=image.id))
    changed = Change(what="1.2", was="1", now="2")
    drawn.replay = Replay(
        of=other.id, verdict=ReplayVerdict.DIFFERENT, max_difference=9, psnr_db=12.25, changed=[changed]
    ).model_dump(mode="json")
    failed = make_job(session, prompt="ошибка")
    jobs.fail_unserved(session, failed.model, limit=1)
    queued = make_job(session, prompt="очередь")
    make_job(session, state=JobState.PROCESSING, prompt="идет")
    workers.publish_capabilities(session, "cheap", CAPABILITIES)
    workers.heartbeat(session, "1", kind="generate", model="cheap", state="ready", space=space.digest)
    session.commit()
    return {"image": image.id, "drawn": drawn.id, "other": other.id, "failed": failed.id, "queued": queued.id} | {
        "job": drawn.job_id
    }


def pages(client: Client, session: Session) -> Iterator[tuple[str, str]]:
    """The name and the text of every page, full and empty, and of every error beside a form."""

    def got(path: str, **query: Any) -> tuple[str, str]:
        return path, client.get(path, query_string=query, headers={"Accept": "text/html"}).text

    def sent(path: str, **form: Any) -> tuple[str, str]:
        answer = client.post(path, data=form, headers=SAME_ORIGIN, follow_redirects=True)
        return f"POST {path}", answer.text

    listed = ("/", "/gallery", "/corpus", "/collections", "/search", "/queue", "/bulks", "/sign-in")
    yield from (got(path) for path in (*listed, "/nothing"))
    of = fill(session)
    with embed_worker(make_space(session)):
        yield got("/", prompt="яблоко red", find="red", pin=of["image"], from_output=of["other"], sent_pictures="1")
        yield got("/", prompt="red", avoid_ids=of["image"], min_similarity="2")
        yield got("/search", query="red")
        yield got("/search", image_id=of["image"])
        yield sent("/", prompt="")
        yield sent("/request", prompt="red")
        yield got(f"/corpus/{of['image']}")
    yield from (got(path) for path in listed)
    yield from (got(f"/jobs/{of[name]}") for name in ("job", "failed", "queued"))
    yield from (got(f"/gallery/{of[name]}") for name in ("drawn", "other"))
    yield got("/gallery", words="ничего")
    yield got("/gallery", reference_id=of["image"], job_id=of["job"])
    yield got("/gallery/compare", selected=[of["drawn"], of["other"]])
    yield got("/gallery/compare", selected=of["drawn"])
    yield got(f"/corpus/{of['image']}/withdraw")
    yield got("/queue", state="dead")
    yield sent("/gallery/like")
    yield sent("/gallery/delete")
    yield sent("/corpus/selected", selected=of["image"])
    yield sent("/corpus", file=[(io.BytesIO(picture()), "1.png"), (io.BytesIO(b"2"), "2.png")])
    yield sent("/collections", name="")
    name, created = sent("/collections", name="1", description="для")
    yield name, created
    collection = re.findall(r"/collections/([0-9a-f-]{36})", created)[0]
    yield sent(f"/collections/{collection}/share", owner="2", access="write")
    yield sent(f"/collections/{collection}/share", owner="")
    yield sent("/bulks")
    yield sent("/bulks", table=(io.BytesIO(b"1,2\n"), "1.csv"))
    yield sent("/bulks", table=(io.BytesIO("prompt,width\nлиф,я\nлиф,32\n".encode()), "1.csv"), on_invalid="skip")
    yield got("/bulks")


@pytest.mark.usefixtures("bracketed")
def test_no_text_of_any_page_is_left_without_translation(client: Client, session: Session) -> None:
    answered = list(pages(client, session))
    assert all(page.count("<h1>") == 1 for _, page in answered)
    api = [client.get(f"{API}/{name}").json for name in ("jobs", "generations", "images", "models", "stats", "bulks")]
    with embed_worker(make_space(session)):
        api.append(client.get(f"{API}/rag/search", query_string={"prompt": "яблоко red"}).json)
    api += [client.get(bulk["errors_url"]).json for bulk in api[5]["items"]]
    data = {*strings(api), *(message for _, page in answered for message in re.findall(MESSAGES, page))}
    left = [f"{path}: {text}" for path, page in answered for text in untranslated(page, data)]
    assert not left, "\n".join(left)


def test_a_browser_gets_its_language_where_the_catalogue_has_it(
    client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "de" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "studio.mo").write_bytes(compiled({"Gallery": "Galerie", "%(number)s queued": "%(number)s warten"}))
    monkeypatch.setattr(translations, "LOCALE", tmp_path)
    translations.languages.cache_clear()
    try:
        german = client.get("/gallery", headers={"Accept-Language": "fr, de-AT;q=0.9, de;q=0.8, en;q=0.5"}).text
        english = client.get("/gallery", headers={"Accept-Language": "fr"}).text
    finally:
        translations.languages.cache_clear()
    assert ('<html lang="de"' in german, "<h1>Galerie</h1>" in german) == (True, True)
    assert ('<html lang="en"' in english, "<h1>Gallery</h1>" in english) == (True, True)


def compiled(texts: dict[str, str]) -> bytes:
    """A file as `msgfmt` makes it (https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html)."""
    entries = sorted({"": "Content-Type: text/plain; charset=utf-8\n", **texts}.items())
    size, tables, strings = len(entries), [], b""
    start = 28 + 16 * size
    for column in (0, 1):
        for entry in entries:
            data = entry[column].encode()
            tables += [len(data), start + len(strings)]
            strings += data + b"\0"
    return struct.pack(f"<7I{len(tables)}I", 0x950412DE, 0, size, 28, 28 + 8 * size, 0, 0, *tables) + strings
