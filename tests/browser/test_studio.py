"""Studio in a real browser, on the stack as `make up` runs it. Skipped where there is no Chromium."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.conftest import Api, disc
from tests.stack import RunningStack, running_stack

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_MS = 60_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with running_stack(tmp_path_factory.mktemp("studio"), environment={}) as stack, Api(stack.url) as api:
        for number, colour in enumerate(("red", "darkred", "green", "blue")):
            image = api.upload(disc(colour, radius=30 + number), caption=f"a {colour} disc", tags="disc")
            api.searchable(image["id"])
        yield stack


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser says of a page: of its script, of the policy, of anything not found."""
    return []


@pytest.fixture
def page(stack: RunningStack, browser: Browser, complaints: list[str]) -> Iterator[Page]:
    """A page that fails its test when the browser complains."""
    page = browser.new_page(base_url=stack.url, viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert complaints == []


def test_from_a_prompt_over_its_memories_to_an_image_and_what_shaped_it(page: Page) -> None:
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
    page.get_by_role("link", name="Draw another like it").click()
    expect(page.locator("#references input[name=pin]:checked")).to_have_count(1)


def test_a_pin_survives_another_prompt_and_a_choice_is_not_undone_by_itself(page: Page) -> None:
    page.goto("/?prompt=a+red+disc")
    green = page.locator("#references .card").filter(has_text="a green disc")
    green.get_by_label("pin").check()
    red = page.locator("#references .card").filter(has_text="a red disc")
    use = red.get_by_label("use")
    chosen = not use.is_checked()
    use.set_checked(chosen)
    page.get_by_text("Settings").click()
    page.get_by_label("Steps").fill("9")
    page.wait_for_timeout(1000)  # longer than typing is waited for
    assert use.is_checked() == chosen
    page.get_by_role("textbox", name="Prompt").fill("a blue disc")
    expect(page.locator("#references .card").first).to_contain_text("pinned: used whatever the prompt")
    expect(page.locator("#references .card").first).to_contain_text("a green disc")
    expect(page.locator("#references .card").filter(has_text="a blue disc")).to_be_visible()


def test_a_mistake_is_told_beside_the_form(page: Page, complaints: list[str]) -> None:
    page.goto("/")
    page.get_by_role("textbox", name="Prompt").fill("a red disc")
    page.get_by_text("Settings").click()
    page.get_by_label("Collection").fill("no-such-collection")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#create .wrong").last).to_contain_text("collection")
    assert all("422" in complaint for complaint in complaints)
    complaints.clear()


def test_images_come_in_are_found_by_a_picture_and_go(page: Page, stack: RunningStack, tmp_path: Path) -> None:
    path = tmp_path / "purple.png"
    path.write_bytes(disc("purple", radius=50))
    page.goto("/memory")
    page.get_by_text("Add images").click()
    page.get_by_label("Files").set_input_files(path)
    page.get_by_label("Caption").fill("a purple disc")
    page.get_by_role("button", name="Add").click()
    expect(page.locator(".card").filter(has_text="a purple disc")).to_be_visible()
    address = page.locator(".card a").first.get_attribute("href") or ""
    with Api(stack.url) as api:
        api.searchable(address.rpartition("/")[2])
    page.get_by_label("like this picture").set_input_files(path)
    page.get_by_role("button", name="Search").click()
    expect(page.locator(".card").first).to_contain_text("a purple disc")
    page.locator(".card a").first.click()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Forget it").click()
    expect(page.get_by_role("heading", name="Memory")).to_be_visible()
    expect(page.locator(".card").filter(has_text="a purple disc")).to_have_count(0)


def test_many_jobs_that_wait_leave_the_browser_free(page: Page, stack: RunningStack) -> None:
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


def test_the_queue_keeps_itself_up_to_date(page: Page, stack: RunningStack) -> None:
    page.goto("/queue")
    with Api(stack.url) as api:
        api.submit(prompt="seen in the queue")
    row = page.locator("tr").filter(has_text="seen in the queue")
    expect(row).to_contain_text("succeeded")


def test_without_scripts_every_step_is_a_page(browser: Browser, stack: RunningStack) -> None:
    page = browser.new_page(base_url=stack.url, java_script_enabled=False)
    page.goto("/")
    page.get_by_role("textbox", name="Prompt").fill("a red disc")
    page.get_by_role("button", name="Show what it remembers").click()
    expect(page.locator("#references .card").first).to_be_visible()
    page.get_by_role("button", name="Generate").click()
    expect(page).to_have_url(re.compile("/jobs/"))
    expect(page.locator(".job")).to_contain_text("succeeded", timeout=PATIENCE_MS)
    page.close()


def test_with_keys_a_person_signs_in_and_every_form_and_picture_works(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = {"AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true"}
    with running_stack(tmp_path_factory.mktemp("keys"), environment=environment) as stack:
        secret = stack.new_key("team", "generate", "search", "corpus:write")
        page = browser.new_page(base_url=stack.url)
        page.set_default_timeout(PATIENCE_MS)
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
