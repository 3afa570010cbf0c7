"""The page in a browser: as wide as a phone, dark and light, on paper, and nothing asked from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.slow
# WCAG AA for text of usual size.
LEAST_CONTRAST = 4.5

# Of every text that is shown: its own colour against the first ground behind it.
CONTRASTS = """() => {
  const channel = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const parse = s => (s.match(/[\\d.]+/g) || []).map(Number);
  const found = [];
  const texts = 'h1, h2, h3, p, th, td, small, dt, dd, li, a, pre, code, span, summary, text';
  for (const e of document.querySelectorAll(texts)) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), own = parse(e.tagName === 'text' ? style.fill : style.color);
    let ground = null;
    for (let up = e; up && !ground; up = up.parentElement) {
      const c = parse(getComputedStyle(up).backgroundColor);
      if (c.length === 3 || c[3] === 1) ground = c;
    }
    const [a, b] = [light(own), light(ground || [255, 255, 255])].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.tagName, e.className.toString(), e.textContent.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 5);
}"""


@pytest.fixture
def show(browser: Any, reported: Any) -> Iterator[Any]:
    pages = []

    def open_page(width: int, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.told = []
        page.on("console", lambda message: page.told.append(message.text))
        page.goto((reported.run / "report.html").as_uri())
        pages.append(context)
        return page

    yield open_page
    for context in pages:
        context.close()


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_page_fits_the_screen(show: Any, width: int) -> None:
    assert show(width).evaluate("document.documentElement.scrollWidth") <= width


def test_page_makes_no_requests_and_logs_nothing(show: Any, reported: Any) -> None:
    page = show(1280)
    assert page.asked == [(reported.run / "report.html").as_uri()]
    assert page.told == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(show: Any, scheme: str) -> None:
    weakest = show(1280, scheme).evaluate(CONTRASTS)
    assert weakest[0][0] >= LEAST_CONTRAST, weakest


def test_dark_mode(show: Any) -> None:
    page = show(1280, "dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    assert page.locator("svg.chart").count() == show(1280).locator("svg.chart").count() > 5


def test_pictures_have_labels(show: Any) -> None:
    labels = show(1280).evaluate("[...document.querySelectorAll('svg')].map(e => e.getAttribute('aria-label'))")
    assert all(label and len(label) > 20 for label in labels)


def test_text_in_pictures_is_readable_on_a_phone(show: Any) -> None:
    page = show(375)
    sizes = page.evaluate("""[...document.querySelectorAll('svg.chart text')].map(e => {
        const placed = e.getScreenCTM();
        return 12 * Math.hypot(placed.a, placed.b);
    })""")
    assert min(sizes) > 8.5
    outside = page.evaluate("""[...document.querySelectorAll('svg.chart text')].filter(e => {
        const own = e.getBoundingClientRect(), all = e.ownerSVGElement.getBoundingClientRect();
        return own.left < all.left - 2 || own.right > all.right + 2 || own.bottom > all.bottom + 2;
    }).map(e => e.textContent)""")
    assert outside == []


def test_print_is_light(show: Any) -> None:
    page = show(1280, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
