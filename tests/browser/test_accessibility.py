"""axe-core finds nothing serious or moderate on any page, in both colour schemes and at both widths.

`axe/axe.min.js` is axe-core 4.14.1 under the Mozilla Public License 2.0, unchanged, with its licences beside it. Only
tests use it.
"""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.conftest import TIMEOUT_MS, needs_chromium
from tests.browser.screenshots import SCHEMES, WIDTHS, addresses, open_view
from tests.e2e.conftest import Api
from tests.stack import RunningStack

AXE = Path(__file__).with_name("axe") / "axe.min.js"
RUN = """async () => {
    const found = await axe.run(document, { resultTypes: ["violations"], rules: { "target-size": { enabled: true } } });
    return found.violations.map(({ id, impact, nodes }) => ({ id, impact, nodes: nodes.map((node) => node.html) }));
}"""
SERIOUS = ("moderate", "serious", "critical")
MAX_FIRST_PAGE_BYTES = 150_000

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def filled_stack(stack: RunningStack) -> RunningStack:
    """The stack with a job, its images, a replay, a collection and a bulk: every view has something to show."""
    with Api(stack.url) as api:
        job = api.submit(prompt="a red disc beside a green disc", num_images=2)
        lines = b'{"bulk": {"name": "discs", "on_invalid": "skip"}}\n{"prompt": "a blue disc"}\n{"prompt": 1}\n'
        headers = {"Content-Type": "application/jsonl"}
        assert api.http.post("/bulks", content=lines, headers=headers).is_success
        assert api.http.post("/collections", json={"name": "discs"}).is_success
        (output, _) = api.ended(job["id"])["outputs"]
        replay = api.http.post(f"/generations/{output['id']}/replay").raise_for_status().json()
        api.ended(replay["id"])
    return stack


def violations(page: Page) -> list[Any]:
    page.evaluate(AXE.read_text())  # by the debugger, which the page's policy allows
    return [each for each in page.evaluate(RUN) if each["impact"] in SERIOUS]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_page_can_be_used_by_all(
    browser: Browser,
    filled_stack: RunningStack,
    scheme: Any,
    width: str,
) -> None:
    page = browser.new_page(base_url=filled_stack.url, viewport=WIDTHS[width], color_scheme=scheme)
    page.set_default_timeout(TIMEOUT_MS)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    found = {}
    views = addresses(filled_stack.url)
    assert {"output", "replay", "compare", "job", "image", "withdraw", "collection", "bulk"} <= views.keys()
    for name, path in views.items():
        open_view(page, path)
        if wrong := violations(page):
            found[name] = wrong
        sideways = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert sideways <= 0, f"{name} scrolls sideways by {sideways} px"
        assert page.locator("h1").count() == 1, name
    page.close()
    assert found == {}
    elsewhere = [url for url in requested if not url.startswith((filled_stack.url, "data:", "blob:"))]
    assert elsewhere == [], "nothing comes from another machine"


def test_the_first_page_is_small(browser: Browser, filled_stack: RunningStack) -> None:
    page = browser.new_page(base_url=filled_stack.url)
    sizes: list[int] = []
    page.on("response", lambda answer: sizes.append(len(answer.body())) if "/api/" not in answer.url else None)
    page.goto("/", wait_until="load")
    page.close()
    assert 0 < sum(sizes) <= MAX_FIRST_PAGE_BYTES
