"""Studio in a real browser, on the stack that `make up` starts. Skipped without Chromium."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.conftest import Api, disc
from tests.stack import RunningStack, running_stack

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_MS = 60_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")


@pytest.fixture(scope="module")
def stack(starter_stack: RunningStack) -> RunningStack:
    """The stack with four images to find."""
    with Api(starter_stack.url) as api:
        for number, colour in enumerate(("red", "darkred", "green", "blue")):
            image = api.upload(disc(colour, radius=30 + number), caption=f"a {colour} disc", tags="disc")
            api.searchable(image["id"])
    return starter_stack


@pytest.fixture(scope="module")
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


def test_a_prompt_and_a_chosen_reference_give_an_image_that_shows_its_reference(page: Page) -> None:
    page.goto("/")
    page.get_by_role("textbox", name="Prompt").fill("a red disc")
    cards = page.locator("#references .card")
    expect(cards.first).to_be_visible()
    for box in page.locator("#references input[name=use]").all():
        box.uncheck()
    chosen = cards.filter(has_text="a green disc")
    chosen.get_by_label("use").check()
    page.get_by_role("button", name="Generate").click()
    job = page.locator("#results .job").first
    expect(job).to_contain_text("processing")
    expect(job.locator("[data-step]")).to_contain_text("step")
    expect(job.locator("[data-previews] img").first).to_be_visible()
    expect(job).to_contain_text("succeeded")
    shown = job.locator(".output > a > img")
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    assert job.locator(".shaped-by img").count() == 1
    shown.click()
    expect(page.get_by_role("heading", name="a red disc")).to_be_visible()
    expect(page.locator(".card")).to_contain_text("a green disc")
    page.get_by_role("link", name="Generate another").click()
    expect(page.locator("#references input[name=pin]:checked")).to_have_count(1)


def test_a_pin_and_a_choice_survive_changes_of_the_form(page: Page) -> None:
    page.goto("/?prompt=a+red+disc")
    green = page.locator("#references .card").filter(has_text="a green disc")
    green.get_by_label("pin").check()
    red = page.locator("#references .card").filter(has_text="a red disc")
    use = red.get_by_label("use")
    chosen = not use.is_checked()
    use.set_checked(chosen)
    page.get_by_text("Settings").click()
    page.get_by_label("Steps").fill("9")
    page.wait_for_timeout(1000)  # longer than the page waits for more typing
    assert use.is_checked() == chosen
    page.get_by_role("textbox", name="Prompt", exact=True).fill("a blue disc")
    expect(page.locator("#references .card").first).to_contain_text("pinned: used for every prompt")
    expect(page.locator("#references .card").first).to_contain_text("a green disc")
    expect(page.locator("#references .card").filter(has_text="a blue disc")).to_be_visible()


def test_an_error_is_shown_beside_the_form(page: Page, browser_errors: list[str]) -> None:
    page.goto("/")
    page.get_by_role("textbox", name="Prompt").fill("a red disc")
    page.get_by_text("Settings").click()
    page.get_by_label("Collection").fill("no-such-collection")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#create .wrong").last).to_contain_text("collection")
    assert all("422" in error for error in browser_errors)
    browser_errors.clear()


def test_images_are_added_found_by_a_picture_and_deleted(page: Page, stack: RunningStack, tmp_path: Path) -> None:
    path = tmp_path / "purple.png"
    path.write_bytes(disc("purple", radius=50))
    page.goto("/corpus")
    page.get_by_text("Add images").click()
    page.get_by_label("Files").set_input_files(path)
    page.get_by_label("Caption").fill("a purple disc")
    page.get_by_role("button", name="Add").click()
    expect(page.locator(".card").filter(has_text="a purple disc")).to_be_visible()
    address = page.locator(".card a").first.get_attribute("href") or ""
    with Api(stack.url) as api:
        api.searchable(address.rpartition("/")[2])
    page.get_by_label("Similar to picture").set_input_files(path)
    page.get_by_role("button", name="Search").click()
    expect(page.locator(".card").first).to_contain_text("a purple disc")
    page.locator(".card a").first.click()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="Corpus")).to_be_visible()
    expect(page.locator(".card").filter(has_text="a purple disc")).to_have_count(0)


def test_many_waiting_jobs_do_not_block_the_browser(page: Page, stack: RunningStack) -> None:
    stack.control.freeze("generate-starter")
    try:
        with Api(stack.url) as api:
            jobs = [api.submit(prompt=f"waits {number}")["id"] for number in range(7)]
        page.goto("/")
        expect(page.locator("#results [data-events]")).to_have_count(6)
        page.get_by_role("textbox", name="Prompt").fill("a red disc")
        expect(page.locator("#references .card").first).to_be_visible()
    finally:
        stack.control.thaw("generate-starter")
    for job_id in jobs[1:]:
        expect(page.locator(f"#job-{job_id}")).to_contain_text("succeeded")
    page.get_by_role("link", name="Queue").click()
    expect(page.get_by_role("heading", name="Queue")).to_be_visible()


def test_the_queue_page_updates_itself(page: Page, stack: RunningStack) -> None:
    page.goto("/queue")
    with Api(stack.url) as api:
        api.submit(prompt="seen in the queue")
    row = page.locator("tr").filter(has_text="seen in the queue")
    expect(row).to_contain_text("succeeded")


def test_without_scripts_every_step_is_a_page(browser: Browser, stack: RunningStack) -> None:
    page = browser.new_page(base_url=stack.url, java_script_enabled=False)
    page.goto("/")
    page.get_by_role("textbox", name="Prompt").fill("a red disc")
    page.get_by_role("button", name="Show references").click()
    expect(page.locator("#references .card").first).to_be_visible()
    page.get_by_role("button", name="Generate").click()
    expect(page).to_have_url(re.compile("/jobs/"))
    expect(page.locator(".job")).to_contain_text("succeeded", timeout=TIMEOUT_MS)
    page.close()


def test_with_keys_a_user_signs_in_and_every_form_and_image_works(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = {"AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true"}
    with running_stack(tmp_path_factory.mktemp("keys"), environment=environment) as stack:
        secret = stack.new_key("team", "generate", "search", "corpus:write")
        page = browser.new_page(base_url=stack.url)
        page.set_default_timeout(TIMEOUT_MS)
        page.goto("/gallery")
        expect(page).to_have_url(re.compile("/sign-in$"))
        page.get_by_label("API key").fill(secret)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("textbox", name="Prompt").fill("a red apple")
        page.get_by_role("button", name="Generate").click()
        job = page.locator("#results .job").first
        expect(job.locator("[data-step]")).to_contain_text("step")
        expect(job).to_contain_text("succeeded")
        picture = job.locator(".output > a > img")
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
        assert secret not in page.content()
        assert page.evaluate("document.cookie") == ""
        job.get_by_role("link", name="a red apple").first.click()
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Delete with its images").click()
        expect(page.get_by_role("heading", name="Queue")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        page.goto("/queue")
        expect(page).to_have_url(re.compile("/sign-in$"))
        page.close()
        assert not any(secret in stack.log(name) for name in ("api", "embed", "generate-starter"))
