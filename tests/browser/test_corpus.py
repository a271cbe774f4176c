"""The pages of the corpus in a real browser: many files by drop, descriptions in place, selection. Needs Chromium."""

import base64
import re

from playwright.sync_api import Browser, FilePayload, Page, expect

from tests.browser.conftest import TIMEOUT_MS, needs_chromium
from tests.e2e.conftest import Api, disc
from tests.stack import RunningStack

DROP = """(files) => {
    const dataTransfer = new DataTransfer();
    for (const [name, data] of files) {
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        dataTransfer.items.add(new File([bytes], name, { type: "image/png" }));
    }
    for (const name of ["dragover", "drop"])
        document.body.dispatchEvent(new DragEvent(name, { dataTransfer, bubbles: true, cancelable: true }));
}"""
MAX_TABS = 120

pytestmark = needs_chromium


def test_of_twenty_dropped_files_two_bad_ones_say_why_and_the_others_are_added(page: Page) -> None:
    pictures = [(f"picture {number}.png", disc(f"#10{number:02x}f0", radius=12)) for number in range(18)]
    sent = [*pictures[:5], ("notes.png", b"just words"), *pictures[5:], ("cut.png", disc("red", radius=13)[:200])]
    page.goto("/corpus")
    page.evaluate(DROP, [(name, base64.b64encode(data).decode()) for name, data in sent])
    page.get_by_label("Tags", exact=True).fill("dropped")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_role("progressbar", name="progress of the upload")).to_be_visible()
    expect(page.locator("[data-progress] [role=status]")).to_have_text(
        "18 of 20 files are in the corpus. 2 could not be added."
    )
    rows = page.get_by_role("list", name="Outcomes").get_by_role("listitem")
    expect(rows).to_have_count(20)
    for name in ("notes.png", "cut.png"):
        expect(rows.filter(has_text=name)).to_contain_text(re.compile("not added.*image", re.DOTALL))
    expect(rows.filter(has=page.get_by_role("img"))).to_have_count(18)
    expect(page.locator("[data-images] .card").first).to_contain_text("dropped")
    page.goto("/corpus?tag=dropped")
    expect(page.locator("[data-images] .card")).to_have_count(18)


def test_a_description_is_edited_in_its_card(page: Page, stack: RunningStack, browser_errors: list[str]) -> None:
    with Api(stack.url) as api:
        image = api.upload(disc("#204060"), caption="before the edit", tags="edited")
    page.goto("/corpus?tag=edited")
    card = page.locator(f'[data-image="{image["id"]}"]')
    card.locator("summary").click()
    card.get_by_label("Caption").fill("after the edit")
    card.get_by_label("Licence").fill("CC0")
    card.get_by_label("Tags").fill("edited, " + "x" * 200)
    card.get_by_role("button", name="Save").click()
    expect(card.get_by_role("alert")).to_be_visible()
    expect(card.get_by_label("Caption")).to_have_value("after the edit")
    assert all("422" in error for error in browser_errors)
    browser_errors.clear()
    card.get_by_label("Tags").fill("edited, round")
    card.get_by_role("button", name="Save").click()
    expect(card.locator("p.caption")).to_have_text("after the edit")
    expect(card.locator("summary")).to_be_focused()
    assert page.url.endswith("/corpus?tag=edited")
    with Api(stack.url) as api:
        saved = api.http.get(f"/images/{image['id']}").json()
    assert (saved["caption"], saved["tags"], saved["licence"]) == ("after the edit", ["edited", "round"], "CC0")


def test_selected_images_are_changed_together(page: Page, stack: RunningStack) -> None:
    with Api(stack.url) as api:
        for number in range(3):
            api.upload(disc(f"#40{number}060"), caption=f"selectable {number}", tags="together")
    page.goto("/corpus?tag=together")
    bar = page.locator("#selection")
    expect(bar).to_be_hidden()
    page.get_by_role("checkbox", name="select selectable 0").check()
    page.get_by_role("checkbox", name="select selectable 2").click(modifiers=["Shift"])
    expect(bar.get_by_role("status")).to_have_text("3 selected")
    page.get_by_role("checkbox", name="select selectable 1").uncheck()
    expect(bar.get_by_role("status")).to_have_text("2 selected")
    bar.get_by_text("Change tags and licence").click()
    bar.get_by_label("Add tags").fill("chosen")
    bar.get_by_role("button", name="Change").click()
    expect(page.get_by_role("link", name="chosen")).to_have_count(2)
    expect(page.locator(".card").filter(has_text="selectable 1").get_by_role("link", name="chosen")).to_have_count(0)


def test_a_description_is_edited_with_the_keyboard_alone(page: Page, stack: RunningStack) -> None:
    with Api(stack.url) as api:
        image = api.upload(disc("#602040"), caption="by hand", tags="keys")
    page.goto("/corpus?tag=keys")
    for _ in range(MAX_TABS):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('.card') && document.activeElement.localName") == "summary":
            break
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("by keys")
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    card = page.locator(f'[data-image="{image["id"]}"]')
    expect(card.locator("p.caption")).to_have_text("by keys")
    expect(card.locator("summary")).to_be_focused()


def test_without_scripts_files_are_added_and_descriptions_edited(browser: Browser, stack: RunningStack) -> None:
    page = browser.new_page(base_url=stack.url, java_script_enabled=False)
    page.set_default_timeout(TIMEOUT_MS)
    page.goto("/corpus")
    if not page.get_by_label("Files").is_visible():
        page.get_by_text("Add images").click()
    files: list[FilePayload] = [
        {"name": "good.png", "mimeType": "image/png", "buffer": disc("#206020")},
        {"name": "bad.png", "mimeType": "image/png", "buffer": b"just words"},
    ]
    page.get_by_label("Files").set_input_files(files)
    page.get_by_role("button", name="Add", exact=True).click()
    rows = page.get_by_role("list", name="Outcomes").get_by_role("listitem")
    expect(rows.filter(has_text="bad.png")).to_contain_text("not added")
    rows.filter(has_text="good.png").get_by_role("link").click()
    page.get_by_text("Edit the description").click()
    page.get_by_label("Caption").fill("without a script")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", name="without a script")).to_be_visible()
    page.close()
