"""Create and the gallery in a real browser: search of the memory, recent prompts, comparison, favourites, scrolling."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.browser.conftest import needs_chromium
from tests.e2e.conftest import Api
from tests.stack import RunningStack, wait_until

MANY = 10_000
PAGES_PER_ANSWER = 10
MAX_TASK_CPU_MS = 100
"""Longest time of the page's main thread in one task. It is CPU time, so other processes do not count."""

pytestmark = needs_chromium


def prompt_of(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Prompt", exact=True)


def test_the_memory_is_searched_in_create_and_what_it_finds_is_pinned(page: Page) -> None:
    page.goto("/?prompt=a+red+disc")
    page.get_by_text("Search the corpus").click()
    words = page.get_by_role("searchbox", name="Words")
    words.fill("a green disc")
    words.press("Enter")
    hit = page.locator("[data-found] .card").filter(has_text="a green disc")
    expect(hit).to_be_visible()
    assert page.locator("#results .job.queued").count() == 0, "Enter searches, and draws nothing"
    hit.get_by_label("pin").check()
    pinned = page.locator("#references .card").filter(has_text="pinned: used for every prompt")
    expect(pinned).to_contain_text("a green disc")
    expect(pinned.get_by_label("pin")).to_be_focused()
    expect(hit).to_have_count(0)
    prompt_of(page).press("Control+Enter")
    job = page.locator("#results .job").first
    expect(job).to_contain_text("succeeded")
    expect(job.locator(".shaped-by")).to_contain_text("pinned")


def test_recent_prompts_stay_in_the_browser_until_they_are_forgotten(page: Page) -> None:
    page.goto("/")
    recent = page.locator("[data-history]")
    expect(recent).to_be_hidden()
    for text in ("a red disc, first", "a red disc, second"):
        prompt_of(page).fill(text)
        prompt_of(page).press("Control+Enter")
        expect(page.locator("#results .job h2").first).to_have_text(text)
    page.goto("/")
    page.get_by_text("Recent prompts").click()
    expect(recent.locator("li")).to_have_text(["a red disc, second", "a red disc, first"])
    recent.get_by_role("button", name="a red disc, first").click()
    expect(prompt_of(page)).to_have_value("a red disc, first")
    expect(prompt_of(page)).to_be_focused()
    page.get_by_text("Recent prompts").click()
    page.get_by_role("button", name="Forget them").click()
    expect(recent).to_be_hidden()
    page.reload()
    expect(recent).to_be_hidden()


def test_several_images_are_queued_while_one_is_drawn(page: Page, stack: RunningStack) -> None:
    with stack.frozen("generate-starter"):
        page.goto("/")
        for text in ("queued first", "queued second"):
            prompt_of(page).fill(text)
            prompt_of(page).press("Control+Enter")
            expect(page.locator("#results .job h2").first).to_have_text(text)
            expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    for text in ("queued first", "queued second"):
        expect(page.locator("#results .job").filter(has_text=text)).to_contain_text("succeeded")


def test_two_results_are_compared_by_a_slider_with_keys(page: Page, stack: RunningStack) -> None:
    with Api(stack.url) as api:
        job = api.ended(api.submit(prompt="two to compare", num_images=2, seed=5)["id"])
    page.goto("/")
    compare = page.locator("[data-compare]")
    expect(compare).to_be_hidden()
    for output in job["outputs"]:
        page.locator(f"[form=compare][value='{output['id']}']").check()
    page.get_by_role("button", name="Compare").click()
    dialog = page.get_by_role("dialog", name="Two images compared")
    slider = dialog.get_by_role("slider")
    expect(slider).to_be_focused()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(slider).to_have_value("55")
    assert (
        dialog.locator(".wiped img").last.evaluate("image => getComputedStyle(image).clipPath")
        == "inset(0px 0px 0px 55%)"
    )
    expect(dialog.get_by_role("row", name="seed")).to_contain_text("6")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_favourites_are_marked_in_place_and_in_the_large_view_and_filtered(page: Page, stack: RunningStack) -> None:
    with Api(stack.url) as api:
        for word in ("one", "two", "three"):
            api.ended(api.submit(prompt=f"a favourite {word}", seed=4)["id"])
    page.goto("/gallery?words=favourite")
    star = page.get_by_role("button", name="favourite: a favourite two")
    star.press("Enter")
    expect(star).to_have_attribute("aria-pressed", "true")
    expect(star).to_be_focused()
    page.locator(".selectable .output > a").first.click()
    page.keyboard.press("f")
    expect(page.get_by_role("dialog").get_by_role("button", name="Favourite")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("s")
    page.keyboard.press("Escape")
    expect(page.locator("[data-selected]")).to_have_text("1 selected")
    page.get_by_label("favourites", exact=True).check()
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator(".selectable")).to_have_count(2)
    page.get_by_role("button", name="favourite: a favourite two").click()
    expect(page.get_by_role("button", name="favourite: a favourite two")).to_have_attribute("aria-pressed", "false")
    page.reload()
    expect(page.locator(".selectable")).to_have_count(1)
    expect(page.locator(".selectable")).to_contain_text("a favourite three")


def test_selected_images_are_remembered_and_found_by_a_picture(page: Page, stack: RunningStack, tmp_path: Path) -> None:
    with Api(stack.url) as api:
        job = api.ended(api.submit(prompt="a disc to remember", seed=8)["id"])
        (output,) = job["outputs"]
        file = tmp_path / "downloaded.png"
        file.write_bytes(api.http.get(f"/generations/{output['id']}/content").content)
    page.goto("/gallery?words=to+remember")
    page.get_by_role("checkbox", name="select a disc to remember").check()
    page.get_by_role("button", name="Remember", exact=True).click()
    expect(page.get_by_role("heading", name="Corpus")).to_be_visible()
    page.goto("/gallery")
    page.get_by_text("Search by a picture").click()
    page.get_by_label("Drop or choose a picture").set_input_files(file)
    page.locator("[data-like]").get_by_role("button", name="Search").click()
    expect(page.locator(".selectable").first).to_contain_text("a disc to remember")


def test_without_scripts_images_are_marked_and_compared(browser: Browser, stack: RunningStack) -> None:
    with Api(stack.url) as api:
        api.ended(api.submit(prompt="plain pages", num_images=2, seed=2)["id"])
    page = browser.new_page(base_url=stack.url, java_script_enabled=False)
    page.goto("/gallery?words=plain+pages")
    page.get_by_role("button", name="favourite: plain pages, seed 3").click()
    expect(page).to_have_url(re.compile(r"/gallery\?words=plain"))
    expect(page.get_by_role("button", name="favourite: plain pages, seed 3")).to_have_attribute("aria-pressed", "true")
    for box in page.get_by_role("checkbox", name="select plain pages").all():
        box.check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("heading", name="Two images compared")).to_be_visible()
    expect(page.locator(".wiped img")).to_have_count(2)
    page.close()


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_ten_thousand_images_scroll_without_a_long_task(browser: Browser, stack: RunningStack, tmp_path: Path) -> None:
    """Scroll through answers that the test makes of a real one, so that only the page's own work counts."""
    with Api(stack.url) as api:
        sent = [api.submit(prompt="scrolled", num_images=16, num_inference_steps=1, mode="none") for _ in range(4)]
        for job in sent:
            api.ended(job["id"], timeout_s=240)
        fragment = api.http.get(f"{stack.url}/gallery?words=scrolled", headers={"X-Fragment": "1"}).text
    images, more = fragment.split('<p class="more"', 1)
    answer = f'{images * PAGES_PER_ANSWER}<p class="more"{more}'

    def serve(route: Route) -> None:
        if "cursor=" in route.request.url:
            route.fulfill(body=answer, content_type="text/html")
        else:
            route.continue_()

    page = browser.new_page(base_url=stack.url, viewport={"width": 1280, "height": 900})
    page.route("**/gallery?*", serve)
    page.goto("/gallery?words=scrolled")
    page.locator("[name=selected]").first.check()
    count = "document.querySelectorAll('[data-page]').length * 48"
    trace = tmp_path / "trace.json"
    browser.start_tracing(page=page, path=trace, categories=["toplevel"])
    while page.evaluate(count) < MANY:
        before = page.evaluate(count)
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        wait_until(lambda: page.evaluate(count) > before, timeout_s=60, what="older images")  # noqa: B023
    for _ in range(40):
        page.mouse.wheel(0, -3000)
        page.evaluate("new Promise(requestAnimationFrame)")
    browser.stop_tracing()
    assert page.locator(".selectable").count() < 1500, "pages far away are empty"
    assert page.locator("[name=selected]:checked").count() == 1, "a selected image stays"
    page.close()
    events = json.loads(trace.read_text())["traceEvents"]
    mains = {
        (each["pid"], each["tid"])
        for each in events
        if each["name"] == "thread_name" and each["args"]["name"] == "CrRendererMain"
    }
    tasks = [each.get("tdur", 0) / 1000 for each in events if (each["pid"], each["tid"]) in mains and "tdur" in each]
    assert len(tasks) > 100
    assert max(tasks) <= MAX_TASK_CPU_MS
