"""Writes a screenshot of every view of Studio, in both colour schemes and at both widths.

`python -m tests.browser.screenshots URL FOLDER` shows a running service as it is.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

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
        "sign-in": "/sign-in",
        "unknown": "/nothing",
    }
    with httpx.Client(base_url=f"{url}/api/v1", timeout=60) as api:

        def latest(resource: str, number: int = 1) -> list[dict[str, Any]]:
            answer = api.get(resource, params={"limit": number}).raise_for_status()
            items: list[dict[str, Any]] = answer.json()["items"]
            return items

        for name, resource, page in (
            ("output", "/generations", "/gallery/{id}"),
            ("job", "/jobs", "/jobs/{id}"),
            ("image", "/images", "/corpus/{id}"),
            ("collection", "/collections", "/collections/{id}"),
            ("bulk", "/bulks", "/bulks/{id}"),
        ):
            for each in latest(resource):
                paths[name] = page.format(**each)
        outputs = latest("/generations", 100)
        for output in outputs:
            if output["replay"]:
                paths["replay"] = f"/gallery/{output['id']}"
            for reference in output["references"]:
                if reference["kind"] == "corpus":
                    paths["image"] = f"/corpus/{reference['image_id']}"
        if "image" in paths:
            paths["withdraw"] = f"{paths['image']}/withdraw"
        if len(outputs) > 1:
            paths["compare"] = "/gallery/compare?" + "&".join(f"selected={each['id']}" for each in outputs[:2])
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
                    height = page.evaluate("document.documentElement.scrollHeight")
                    page.set_viewport_size({"width": viewport["width"], "height": max(height, viewport["height"])})
                    target = arguments.folder / f"{name}-{width}-{scheme}.png"
                    page.screenshot(path=target)
                    page.set_viewport_size(viewport)
                    print(target)
                page.close()


if __name__ == "__main__":
    main()
