"""Writes a screenshot of every view of Studio, in both colour schemes and at both widths.

`python -m tests.browser.screenshots URL FOLDER` shows a running service as it is.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
WIDTHS: dict[str, ViewportSize] = {
    "desktop": {"width": 1280, "height": 900},
    "phone": {"width": 390, "height": 844},
}
SETTLED_MS = 700
"""Time for pictures and for the references of a prompt."""


def addresses(url: str) -> dict[str, str]:
    """The path of each view by name. Views of a thing show its latest one."""
    paths = {
        "create": "/?prompt=a+red+apple+beside+a+pear",
        "create-empty": "/",
        "create-search": "/?prompt=a+red+apple&find=a+pear",
        "gallery": "/gallery",
        "gallery-nothing": "/gallery?words=nothing-has-this-prompt",
        "corpus": "/corpus",
        "search": "/search?query=a+red+apple",
        "collections": "/collections",
        "queue": "/queue",
        "bulks": "/bulks",
        "unknown": "/nothing",
    }
    with httpx.Client(base_url=f"{url}/api/v1") as api:
        for name, path, page in (
            ("output", "/generations", "/gallery/{id}"),
            ("job", "/jobs", "/jobs/{id}"),
            ("image", "/images", "/corpus/{id}"),
            ("collection", "/collections", "/collections/{id}"),
            ("bulk", "/bulks", "/bulks/{id}"),
        ):
            items = api.get(path, params={"limit": 1}).raise_for_status().json()["items"]
            if items:
                paths[name] = page.format(id=items[0]["id"])
        pair = api.get("/generations", params={"limit": 2}).raise_for_status().json()["items"]
        if len(pair) == 2:
            paths["compare"] = f"/gallery/compare?selected={pair[0]['id']}&selected={pair[1]['id']}"
    return paths


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_view(page: Page, path: str) -> None:
    """Open a view and wait until it looks as it stays."""
    page.goto(path, wait_until="load")
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.wait_for_timeout(SETTLED_MS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.browser.screenshots", description=__doc__)
    parser.add_argument("url", help="address of the service")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=(), help="names of views")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    paths = addresses(arguments.url)
    with chromium() as browser:
        for scheme in SCHEMES:
            for width, viewport in WIDTHS.items():
                page = browser.new_page(base_url=arguments.url, viewport=viewport, color_scheme=scheme)
                for name in arguments.only or paths:
                    open_view(page, paths[name])
                    target = arguments.folder / f"{name}-{width}-{scheme}.png"
                    page.screenshot(path=target, full_page=True)
                    print(target)
                page.close()


if __name__ == "__main__":
    main()
