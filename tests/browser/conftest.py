"""A browser, and the stack that `make up` starts, with a few images to find."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.conftest import Api, disc
from tests.stack import RunningStack

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_MS = 60_000

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")


@pytest.fixture(scope="package")
def stack(starter_stack: RunningStack) -> RunningStack:
    """The stack with four images to find."""
    with Api(starter_stack.url) as api:
        for number, colour in enumerate(("red", "darkred", "green", "blue")):
            image = api.upload(disc(colour, radius=30 + number), caption=f"a {colour} disc", tags="disc")
            api.searchable(image["id"])
    return starter_stack


@pytest.fixture(autouse=True)
def _the_corpus_stays(stack: RunningStack) -> Iterator[None]:
    """Delete the images that a test adds, because other tests would find them."""
    with Api(stack.url) as api:
        before = images_of(api)
        yield
        for image_id in images_of(api) - before:
            api.http.delete(f"/images/{image_id}")


def images_of(api: Api) -> set[str]:
    """The ids of the 100 latest images. No test adds more."""
    answer = api.http.get("/images", params={"limit": 100}).raise_for_status()
    return {image["id"] for image in answer.json()["items"]}


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browser_errors() -> list[str]:
    """Errors that the browser reports: of the page's script, of its security policy, or of a missing file."""
    return []


@pytest.fixture
def page(stack: RunningStack, browser: Browser, browser_errors: list[str]) -> Iterator[Page]:
    """A page that fails its test when the browser reports an error."""
    page = browser.new_page(base_url=stack.url, viewport={"width": 1280, "height": 900})
    page.set_default_timeout(TIMEOUT_MS)
    page.on("pageerror", lambda error: browser_errors.append(str(error)))
    page.on("console", lambda message: browser_errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert browser_errors == []
