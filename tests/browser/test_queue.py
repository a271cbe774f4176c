"""The pages of the queue and of bulks in a real browser, and open pages during faults. Needs Chromium."""

import httpx
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import needs_chromium
from tests.e2e.conftest import Api, disc
from tests.stack import RunningStack, wait_until

pytestmark = needs_chromium


def test_a_waiting_job_is_shown_with_its_place_and_canceled_with_the_keyboard(page: Page, stack: RunningStack) -> None:
    page.goto("/queue")
    with stack.frozen("generate-starter"), Api(stack.url) as api:
        held = [api.submit(prompt=f"held {number}")["id"] for number in range(3)]
        row = page.locator("[data-job]").filter(has_text="held 2")
        expect(row).to_contain_text("ahead")
        cancel = row.get_by_role("button", name="Cancel")
        cancel.focus()
        api.submit(prompt="comes later")
        expect(page.locator("[data-job]").filter(has_text="comes later")).to_be_visible()
        expect(cancel).to_be_focused()
        page.keyboard.press("Enter")
        expect(row).to_contain_text("canceled", use_inner_text=True)
        expect(row.get_by_role("button", name="Try again")).to_be_visible()
        for job_id in held:
            api.http.post(f"/jobs/{job_id}/cancel")


def test_a_bulk_is_paused_resumed_and_tells_its_wrong_lines(page: Page, stack: RunningStack) -> None:
    page.goto("/bulks")
    if not page.get_by_label("CSV file").is_visible():
        page.get_by_text("Start a bulk").click()
    page.get_by_label("Name", exact=True).fill("with a wrong line")
    table = b"prompt,width\na red disc,\na blue disc,wide\na green disc,\n"
    page.get_by_label("CSV file").set_input_files({"name": "discs.csv", "mimeType": "text/csv", "buffer": table})
    page.get_by_label("If a line is wrong").select_option("leave it out")
    with stack.frozen("generate-starter"):
        page.get_by_role("button", name="Start").click()
        page.get_by_role("button", name="Pause").click()
        expect(page.locator("#bulk [role=status]")).to_have_text("paused")
        page.get_by_role("button", name="Resume").click()
        expect(page.locator("#bulk [role=status]")).to_have_text("running")
    expect(page.locator("#bulk [role=status]")).to_have_text("completed")
    expect(page.locator(".sheet img")).to_have_count(2)
    expect(page.locator(".line.failed")).to_contain_text("line 3")
    page.goto("/bulks")
    row = page.locator(".line").filter(has_text="with a wrong line")
    expect(row).to_contain_text("2 of 2 drawn")


def test_the_queue_stays_live_while_redis_is_frozen(page: Page, stack: RunningStack) -> None:
    page.goto("/queue")
    with stack.frozen("queue", "cache"):
        sent = httpx.post(
            f"{stack.url}/", data={"prompt": "beside a frozen Redis"}, headers={"Origin": stack.url}, timeout=30
        )
        assert sent.status_code == 303
        row = page.locator("[data-job]").filter(has_text="beside a frozen Redis")
        expect(row).to_be_visible()
    expect(row).to_contain_text("succeeded")


def test_pages_survive_a_dead_postgres_and_a_form_is_not_lost(
    page: Page, browser: Browser, stack: RunningStack, browser_errors: list[str]
) -> None:
    queue = browser.new_page(base_url=stack.url)
    queue.goto("/queue")
    page.goto("/collections")
    page.get_by_text("New collection").click()
    page.get_by_label("Name").fill("kept")
    page.get_by_label("Description").fill("what I typed")
    stack.control.stop("postgres")
    try:
        page.get_by_role("button", name="Create").click()
        expect(page.get_by_role("heading", name="Nothing that you typed is lost")).to_be_visible()
        expect(page.locator("main")).to_contain_text("what I typed")
        expect(queue.locator("[data-offline]")).to_be_visible()
    finally:
        stack.control.start("postgres")
    wait_until(
        lambda: httpx.get(f"{stack.url}/api/v1/health").status_code == 200, timeout_s=60, what="Postgres to be back"
    )
    page.get_by_role("button", name="Send again").click()
    expect(page.get_by_role("heading", name="kept")).to_be_visible()
    expect(page.locator("main")).to_contain_text("what I typed")
    expect(queue.locator("[data-offline]")).to_be_hidden()
    with Api(stack.url) as api:
        api.submit(prompt="after the outage")
    expect(queue.locator("[data-job]").filter(has_text="after the outage")).to_be_visible()
    queue.close()
    browser_errors.clear()


def test_files_that_are_sent_during_an_outage_are_sent_again(
    page: Page, stack: RunningStack, browser_errors: list[str]
) -> None:
    page.goto("/corpus")
    if not page.get_by_label("Files").is_visible():
        page.get_by_text("Add images").click()
    name = "patient.png"
    page.get_by_label("Files").set_input_files(
        {"name": name, "mimeType": "image/png", "buffer": disc("#123456", radius=33)}
    )
    row = page.get_by_role("list", name="Outcomes").get_by_role("listitem").filter(has_text=name)
    stack.control.freeze("postgres")
    try:
        page.get_by_role("button", name="Add", exact=True).click()
        expect(row).to_contain_text("waits to be sent again")
    finally:
        stack.control.thaw("postgres")
    expect(row).to_contain_text("added")
    expect(row.get_by_role("link")).to_have_count(1)
    browser_errors.clear()
