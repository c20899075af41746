"""A page in Chromium that records what went wrong: console errors, exceptions, other hosts."""

import contextlib
import os
import shutil
from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


class Visit:
    """One tab. `refused` are statuses that a test expects, which Chromium logs as errors."""

    def __init__(self, browser, url, **options):
        self.url = url
        self.context = browser.new_context(
            viewport={"width": 1280, "height": 900}, accept_downloads=True, **options
        )
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.refused = set()
        self.problems = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._on_console)
        self.page.on("request", self._on_request)

    def _on_console(self, message):
        text = message.text
        is_expected = any(f"status of {status} " in text for status in self.refused)
        if message.type in ("error", "warning") and not is_expected:
            self.problems.append(f"{message.type}: {text}")

    def _on_request(self, request):
        if not request.url.startswith((self.url + "/", f"blob:{self.url}/", "data:,")):
            self.problems.append(f"asked for {request.url}")

    def open(self, place="#/sets"):
        """Show a view, and wait for its heading."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.url}/{place}")
        self.page.wait_for_selector("h1")
        return self.page

    def text(self, selector):
        return self.page.locator(selector).all_inner_texts()

    def picture(self, name):
        """Keep a screenshot in docs/pictures, if the variable PICTURES is set."""
        if os.environ.get("PICTURES"):
            PICTURES.mkdir(exist_ok=True)
            self.page.evaluate("scrollTo(0, 0)")
            self.page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


@contextlib.contextmanager
def visiting(browser, url, **options):
    """A tab of its own at `url`, in which nothing may have gone wrong at the end."""
    visit = Visit(browser, url, **options)
    try:
        yield visit
        assert visit.problems == []
    finally:
        visit.context.close()
