"""A page in a real headless browser, and what is wrong with it."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
"""The browser, if the machine has one."""
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; `apt-get install chromium` gets it"
)
LEAST_CONTRAST = 4.5
"""Of text on its background, by WCAG 2 (AA)."""
WAIT = 10_000
"""Milliseconds after which something that does not come is a fault."""

IMAGES = """
() => [...document.images].filter((image) => {
  const box = image.getBoundingClientRect();
  return !(image.complete && image.naturalWidth > 0 && box.width > 20 && box.height > 20
    && image.checkVisibility({opacityProperty: true, visibilityProperty: true}));
}).map((image) => image.alt || image.src.slice(0, 40))
"""
COLOURS = """
() => [...document.querySelectorAll("body, body *")]
  .filter((e) => e.checkVisibility() && [...e.childNodes].some(
    (node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim()))
  .map((e) => {
    let under = e;
    const clear = (x) => /^rgba\\(.*, 0\\)$/.test(getComputedStyle(x).backgroundColor);
    while (clear(under) && under.parentElement) under = under.parentElement;
    return [e.tagName + "." + e.className, getComputedStyle(e).color,
      clear(under) ? "rgb(255, 255, 255)" : getComputedStyle(under).backgroundColor];
  })
"""


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(
    chromium: Browser, file: Path, *, colours: str = "light", width: int = 1280
) -> Iterator[tuple[Page, list[str]]]:
    """A file in a browser without a network, and what it complained about, which may grow.

    Args:
        chromium: the browser.
        file: the page.
        colours: `light` or `dark`.
        width: of the window; a phone has 390.
    """
    complaints: list[str] = []
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, color_scheme=colours, offline=True
    )
    context.set_default_timeout(WAIT)
    page = context.new_page()
    page.on("console", lambda m: m.type == "error" and complaints.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: complaints.append(f"script: {error}"))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:80]}"))
    page.on(
        "request",
        lambda r: r.url not in (file.as_uri(),) and not r.url.startswith("data:")
        and complaints.append(f"asked for: {r.url[:80]}"),
    )  # fmt: skip
    page.goto(file.as_uri())
    page.wait_for_load_state()
    yield page, complaints
    context.close()


def faults(page: Page, complaints: list[str]) -> list[str]:
    """What is wrong with an opened page; nothing if all is well."""
    found = list(complaints)
    found += [f"image: {name}" for name in page.evaluate(IMAGES)]
    needed, there = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    if needed > there:
        found.append(f"overflow: {needed} of {there} pixels")
    pale = {
        f"contrast: {name} {text} on {back}"
        for name, text, back in page.evaluate(COLOURS)
        if contrast(text, back) < LEAST_CONTRAST
    }
    return found + sorted(pale)


def contrast(text: str, back: str) -> float:
    """Contrast of two CSS colours by WCAG 2.

    >>> round(contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)"), 1)
    21.0
    """
    high, low = sorted((_luminance(text), _luminance(back)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
