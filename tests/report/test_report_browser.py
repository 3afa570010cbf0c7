"""The page in a browser: as wide as a phone, dark and light, on paper, and nothing asked from anywhere."""

from collections.abc import Iterator
from typing import Any

import pytest

from kit.pages import weakest_contrast

pytestmark = pytest.mark.slow


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
def test_page_fits_the_screen(show, width):
    assert show(width).evaluate("document.documentElement.scrollWidth") <= width


def test_page_makes_no_requests_and_logs_nothing(show, reported):
    page = show(1280)
    assert page.asked == [(reported.run / "report.html").as_uri()]
    assert page.told == []


def test_text_in_pictures_is_readable_on_a_phone(show):
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


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(13, 17, 23)")])
def test_text_has_enough_contrast(show, scheme, ground):
    page = show(1280, scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    assert page.locator("svg.chart").count() > 5
    assert weakest_contrast(page)[0] >= 4.5, weakest_contrast(page)


def test_print_is_light(show):
    page = show(1280, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")
