"""The service below a path of a host: every link, redirect and cookie leads through the proxy's prefix."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from sqlalchemy.orm import Session

from afterimage_client import Afterimage, GenerateRequest, ImageFile, UploadFields
from shared.settings import Settings, get_settings
from tests.factories import make_image, make_job, make_space
from tests.integration.conftest import API, AppFactory, Client, a_key, picture, running_server
from tests.integration.test_api_search import towards
from tests.integration.test_export_outputs import make_output

PREFIX = "/on/afterimage"


@pytest.fixture(autouse=True)
def prefix(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_API__PATH_PREFIX", PREFIX)
    monkeypatch.setenv("AFTERIMAGE_RETRIEVAL__TEXT_TIMEOUT_S", "0.3")  # no embed worker runs
    get_settings.cache_clear()


@pytest.fixture(params=["passes the prefix on", "removes the prefix"])
def proxy(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of the service behind a proxy that serves nothing outside of the prefix."""
    with running_server() as upstream, httpx.Client(base_url=upstream.url, timeout=20) as http:

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path
                if not f"{urlsplit(path).path}/".startswith(f"{PREFIX}/"):
                    self.send_error(404, "outside of the prefix")
                    return
                if request.param == "removes the prefix":
                    path = path.removeprefix(PREFIX) or "/"
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = http.request(self.command, path, content=body, headers=dict(self.headers.items()))
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None: ...

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
            server.shutdown()
            thread.join()


def test_every_page_and_link_is_served_through_a_proxy(proxy: str, session: Session) -> None:
    make_space(session)
    image = make_image(session, vector=towards(a0=1), tags=["fruit"])
    output = make_output(session, 7)
    make_job(session)
    session.commit()
    missing = {f"{API}/images/{each}/thumbnail" for each in (image.id, *_references(output))}
    missing |= {f"{API}/images/{image.id}/content"}
    with httpx.Client(timeout=20) as http:
        seen, found = set[str](), [f"{proxy}/", f"{proxy}/docs"]
        while found:
            address = found.pop()
            if address in seen or any(urlsplit(address).path.endswith(each) for each in missing):
                continue
            seen.add(address)
            answer = http.get(address, follow_redirects=True)
            if "/corpus/" in address and not answer.is_success:
                continue  # a reference of the output, which this corpus does not have
            assert answer.is_success, (address, answer.text[:200])
            if answer.headers["Content-Type"].startswith("text/html") and "/docs" not in address:
                links = re.findall(r'(?:href|src|action|data-part|data-as-typed)="([^"#]+)"', answer.text)
                posted = set(re.findall(r'(?:method="post" |form)action="([^"]+)"', answer.text))
                found += [urljoin(str(answer.url), link.replace("&amp;", "&")) for link in links if link not in posted]
                assert all(link.startswith(PREFIX) for link in posted)
        assert len(seen) > 15
        assert f"{proxy}/studio/studio.js" in seen
        assert 'new URL("../sign-in", import.meta.url)' in http.get(f"{proxy}/studio/studio.js").text
        document = re.findall(r'"([^"]*openapi\.json)"', http.get(f"{proxy}/docs/swagger").text)[0]
        servers = http.get(urljoin(proxy, document)).json()["servers"]
        assert [server["url"] for server in servers] == [PREFIX]


def _references(output: Any) -> list[str]:
    return [each["image_id"] for each in output.provenance["references"]]


def test_links_in_answers_are_served_through_a_proxy(proxy: str) -> None:
    with Afterimage(proxy) as service, httpx.Client(timeout=20) as http:
        (image,) = service.images.upload([ImageFile("a.png", picture())], UploadFields()).images
        job = service.jobs.submit(GenerateRequest(prompt="a red apple"))
        for link in (image.url, image.content_url, image.thumbnail_url, job.url):
            assert link.startswith(f"{PREFIX}{API}/")
            assert http.get(urljoin(proxy, link)).status_code == 200, link
        answer = http.post(f"{proxy}{API}/generate", json={"prompt": "a pear"})
        assert http.get(urljoin(proxy, answer.headers["Location"])).json()["id"] == answer.json()["id"]
        lines = '{"prompt": "a pear"}\n'
        bulk = http.post(f"{proxy}{API}/bulks", content=lines, headers={"Content-Type": "application/jsonl"})
        assert http.get(urljoin(proxy, bulk.headers["Location"])).json()["id"] == bulk.json()["id"]
        made = http.post(f"{proxy}/", data={"prompt": "a plum"}, headers={"Origin": _origin(proxy)})
        assert (made.status_code, http.get(urljoin(proxy, made.headers["Location"])).status_code) == (303, 200)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


@pytest.fixture
def client(settings: Settings, new_app: AppFactory, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("AFTERIMAGE_SECURITY__REQUIRE_API_KEYS", "true")
    get_settings.cache_clear()
    return new_app(get_settings()).test_client()


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (PREFIX, f"{PREFIX}/"),
        (f"{PREFIX}?prompt=a%20b", f"{PREFIX}/?prompt=a%20b"),
        (f"{PREFIX}{API}//jobs", f"{PREFIX}{API}/jobs"),
        (f"{PREFIX}/docs", f"{PREFIX}/docs/swagger"),
        (f"{PREFIX}//other.example//", None),
    ],
)
def test_a_redirect_keeps_the_scheme_of_the_proxy(client: Client, path: str, place: str | None) -> None:
    """The service does not see the scheme, so it names none."""
    answer = client.get(path, headers={"X-Forwarded-Proto": "https"})
    assert answer.location == place


@pytest.mark.parametrize(("scheme", "name"), [("https", "__Secure-afterimage_key"), ("http", "afterimage_key")])
def test_the_cookie_with_the_key_is_sent_only_below_the_prefix(
    client: Client, session: Session, scheme: str, name: str
) -> None:
    secret = a_key(session, "generate", "search")["Authorization"].removeprefix("Bearer ")
    origin = {"Origin": f"{scheme}://localhost", "X-Forwarded-Proto": scheme}
    redirected = client.get(f"{PREFIX}/queue", headers=origin)
    assert redirected.location == f"{PREFIX}/sign-in"
    signed_in = client.post(f"{PREFIX}/sign-in", data={"key": secret}, headers=origin)
    assert signed_in.location == f"{PREFIX}/"
    (cookie,) = signed_in.headers.getlist("Set-Cookie")
    assert cookie.startswith(f"{name}=")
    assert f"Path={PREFIX}" in cookie
    sent = origin | {"Cookie": f"{name}={secret}"}
    assert client.get(f"{PREFIX}/queue", headers=sent).status_code == 200
    (cookie,) = client.post(f"{PREFIX}/sign-out", headers=sent).headers.getlist("Set-Cookie")
    assert f"Path={PREFIX}" in cookie
    assert cookie.startswith(f"{name}=;")


def test_paths_without_the_prefix_are_those_of_probes(client: Client) -> None:
    for path in ("/health/live", "/metrics", f"{API}/health/live", f"{PREFIX}/health/live"):
        assert client.get(path).status_code == 200, path
    assert client.get(f"{PREFIX}x/health/live").status_code == 404
