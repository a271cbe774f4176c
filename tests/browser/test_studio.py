"""Studio in a real browser, on the stack that `make up` starts. Skipped without Chromium."""

import base64
import re
import zipfile
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import TIMEOUT_MS, needs_chromium
from tests.e2e.conftest import Api, disc
from tests.stack import RunningStack, running_stack, wait_until

DROP = """(target, data) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
    for (const name of ["dragover", "drop"])
        target.dispatchEvent(new DragEvent(name, { dataTransfer, bubbles: true, cancelable: true }));
}"""

pytestmark = needs_chromium


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
    expect(job.locator("[data-state]")).to_have_text("drawing")
    expect(job.locator("[data-step]")).to_contain_text("step")
    expect(job.locator("[data-previews] img").first).to_be_visible()
    expect(job).to_contain_text("succeeded")
    shown = job.locator(".output > a > img")
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
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


def test_a_choice_stays_while_its_image_is_in_the_plan(page: Page) -> None:
    page.goto("/?prompt=a+red+disc")
    green = page.locator("#references .card").filter(has_text="a green disc")
    use = green.get_by_label("use")
    chosen = not use.is_checked()
    use.set_checked(chosen)
    page.get_by_role("textbox", name="Prompt", exact=True).fill("a red disc on white")
    expect(green).to_contain_text("You added it." if chosen else "You dropped it.")
    expect(use).to_be_checked(checked=chosen)


def test_a_picture_of_the_moment_shapes_the_image_that_is_then_downloaded(page: Page, tmp_path: Path) -> None:
    page.goto("/")
    prompt = page.get_by_role("textbox", name="Prompt", exact=True)
    prompt.fill("an orange disc")
    page.locator("[data-pictures]").evaluate(DROP, base64.b64encode(disc("orange", radius=47)).decode())
    expect(page.get_by_role("button", name="Remove dropped.png")).to_be_visible()
    page.get_by_label("Add a picture as a reference").set_input_files(
        {"name": "chosen.png", "mimeType": "image/png", "buffer": disc("gold", radius=21)}
    )
    expect(page.locator("[data-chosen] .card")).to_have_count(2)
    page.get_by_role("button", name="Remove chosen.png").click()
    page.get_by_role("button", name="Show this request").click()
    shown = page.get_by_role("dialog")
    expect(shown).to_contain_text("reference_image=@picture-1.png")
    shown.get_by_role("button", name="Close").click()
    prompt.press("Control+Enter")
    job = page.locator("#results .job").first
    expect(job).to_contain_text("succeeded")
    expect(job.locator(".shaped-by")).to_contain_text("sent")
    job.locator(".output > a").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    with Image.open(download.value.path()) as image:
        assert image.format == "PNG"
    page.get_by_role("link", name="More like this").click()
    expect(prompt).to_have_value("an orange disc")
    expect(page.get_by_label("use this image")).to_be_checked()


def test_the_gallery_is_searched_selected_and_downloaded(page: Page, stack: RunningStack) -> None:
    with Api(stack.url) as api:
        ended = [api.ended(api.submit(prompt=f"gallery {word}", seed=4)["id"]) for word in ("one", "two", "three")]
    page.goto("/gallery")
    page.get_by_label("Words of the prompt").fill("GALLERY")
    page.get_by_role("button", name="Search").click()
    expect(page.locator(".selectable")).to_have_count(3)
    page.get_by_role("checkbox", name="select gallery two").check()
    page.get_by_role("checkbox", name="select gallery three").check()
    expect(page.locator("[data-selected]")).to_have_text("2 selected")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as ZIP").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert len(archive.namelist()) == 2
    page.locator(".selectable .output > a").first.click()
    large = page.get_by_role("dialog")
    expect(large).to_contain_text("gallery three")
    page.keyboard.press("ArrowRight")
    expect(large).to_contain_text("gallery two")
    large.get_by_role("link", name="Open with its references").click()
    expect(page).to_have_url(re.compile(ended[1]["outputs"][0]["id"]))


def test_the_gallery_loads_older_images_and_returns_to_its_place(page: Page, stack: RunningStack) -> None:
    with Api(stack.url) as api:
        for _ in range(4):
            job = api.submit(prompt="many", num_images=16, num_inference_steps=1, mode="none")
        api.ended(job["id"], timeout_s=240)
    page.goto("/gallery?words=many")
    images = page.locator(".selectable")
    page.mouse.wheel(0, 20_000)
    expect(images).to_have_count(64)  # more than a page has
    images.last.scroll_into_view_if_needed()
    kept = "history.state?.loaded === 2 && Math.abs(history.state.top - scrollY) < 1"
    wait_until(lambda: page.evaluate(kept), timeout_s=30, what="the place to be kept")
    top = page.evaluate("scrollY")
    assert top > 1000
    page.goto("/queue")
    page.go_back()
    expect(images).to_have_count(64)
    near = "top => Math.abs(scrollY - top) < 300"
    wait_until(lambda: page.evaluate(near, top), timeout_s=30, what="the place that was left")


def test_a_bulk_goes_from_a_table_to_its_contact_sheet(page: Page) -> None:
    page.goto("/bulks")
    if not page.get_by_label("CSV file").is_visible():
        page.get_by_text("Start a bulk").click()
    page.get_by_label("Name", exact=True).fill("discs by table")
    table = b"prompt,seed\na red disc,1\na blue disc,2\n"
    page.get_by_label("CSV file").set_input_files({"name": "discs.csv", "mimeType": "text/csv", "buffer": table})
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("heading", name="discs by table")).to_be_visible()
    expect(page.get_by_role("status").first).to_have_text("completed")
    expect(page.locator(".sheet img")).to_have_count(2)


def test_times_are_those_of_the_readers_zone(browser: Browser, stack: RunningStack) -> None:
    with Api(stack.url) as api:
        job = api.submit(prompt="in Tokyo")
    page = browser.new_page(base_url=stack.url, timezone_id="Asia/Tokyo", locale="en-GB")
    page.goto(f"/jobs/{job['id']}")
    accepted = datetime.fromisoformat(job["created_at"]).astimezone(ZoneInfo("Asia/Tokyo"))
    expect(page.locator("dd time").first).to_contain_text(f"{accepted:%H:%M}")
    page.close()


def test_the_theme_is_kept(page: Page) -> None:
    page.goto("/queue")
    page.get_by_role("button", name="Theme").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.goto("/gallery")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


def test_the_navigation_of_a_phone_is_one_line(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto("/")
    tops = page.locator("header nav a").evaluate_all("links => links.map((link) => link.getBoundingClientRect().top)")
    assert len(set(tops)) == 1


def test_typing_goes_on_while_the_service_is_away(page: Page, browser_errors: list[str]) -> None:
    page.goto("/")
    page.route("**/references?*", lambda route: route.abort())
    page.get_by_role("textbox", name="Prompt", exact=True).fill("a red disc")
    expect(page.locator("[data-offline]")).to_be_visible()
    page.unroute("**/references?*")
    page.get_by_role("textbox", name="Prompt", exact=True).press_sequentially(" now")
    expect(page.locator("[data-offline]")).to_be_hidden()
    expect(page.locator("#references .card").first).to_be_visible()
    browser_errors.clear()


def test_an_error_is_shown_beside_the_form(page: Page, browser_errors: list[str]) -> None:
    page.goto("/")
    page.get_by_role("textbox", name="Prompt").fill("a red disc")
    page.get_by_text("Settings").click()
    page.get_by_label("Collection").fill("no-such-collection")
    page.get_by_role("button", name="Generate").click()
    beside = page.get_by_label("Collection").locator("xpath=..").locator(".field-wrong")
    expect(beside).to_contain_text("no collection")
    expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_have_value("a red disc")
    page.get_by_label("Collection").fill("")
    page.get_by_role("textbox", name="Prompt", exact=True).fill(" ")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".field-wrong")).to_have_text("Say in words what the picture should show.")
    assert all("422" in error for error in browser_errors)
    browser_errors.clear()


def test_images_are_added_found_by_a_picture_and_deleted(page: Page, stack: RunningStack, tmp_path: Path) -> None:
    path = tmp_path / "purple.png"
    path.write_bytes(disc("purple", radius=50))
    page.goto("/corpus")
    page.get_by_text("Add images").click()
    page.get_by_label("Files").set_input_files(path)
    page.get_by_label("Caption", exact=True).fill("a purple disc")
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
    row = page.locator("[data-job]").filter(has_text="seen in the queue")
    expect(row).to_contain_text("succeeded")


def test_a_job_is_canceled_and_tried_again_in_its_row_of_the_queue(page: Page, stack: RunningStack) -> None:
    with stack.frozen("generate-starter"):
        with Api(stack.url) as api:
            api.submit(prompt="canceled in its row")
        page.goto("/queue")
        row = page.locator("[data-job]").filter(has_text="canceled in its row")
        row.get_by_role("button", name="Cancel").click()
        expect(row).to_contain_text("canceled", use_inner_text=True)
        row.get_by_role("button", name="Try again").click()
        expect(row).to_have_count(2)
    expect(row.first).to_contain_text("succeeded")


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
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
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
