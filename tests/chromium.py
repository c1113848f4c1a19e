"""A real Chromium for tests of pages, driven by playwright; no browser is downloaded."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def chromium() -> Iterator:
    """playwright's browser object; tests are skipped where it or Chromium is missing."""
    reason = "playwright is missing: pip install playwright"
    sync = pytest.importorskip("playwright.sync_api", reason=reason)
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("neither chromium nor google-chrome is on the PATH")
    with sync.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@contextlib.contextmanager
def window(browser, width: int = 1280, dark: bool = False) -> Iterator:
    """A new page, a phone's if it is narrow, none of whose scripts may fail."""
    scheme = "dark" if dark else "light"
    size = {"width": width, "height": 900}
    page = browser.new_page(viewport=size, is_mobile=width < 600, color_scheme=scheme)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    assert errors == []
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as opened:
        yield opened
