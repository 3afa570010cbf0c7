"""The chat page in a browser."""

import string
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kit.pages import weakest_contrast
from serve.servers import CHAT

pytestmark = pytest.mark.slow
MARKDOWN = (
    "# Top\n\nSome **bold** and `code`.\n\n- one\n- two\n\n```python\nx = 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |"
)
ATTACKS = [
    "<script>window.hurt = 1</script>",
    '<img src=x onerror="window.hurt = 1">',
    "[click](JaVaScRiPt:window.hurt=1) [x](data:text/html,<script>window.hurt=1</script>)",
    "![x](https://x.example/track.png)",
    "```html\n</code></pre><script>window.hurt = 1</script>\n```",
    "| <b>a</b> |\n|---|---|\n| <iframe src=javascript:window.hurt=1> |",
    "# <script>window.hurt = 1</script>\n> <style>*{display:none}</style>\n- <a href=javascript:window.hurt=1>x</a>",
    "[a](java\tscript:window.hurt=1) [b]( javascript:window.hurt=1) [c](vbscript:x) [d](//x.example/a) [e](/page/a)",
]


@pytest.fixture
def show(browser: Any, start: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Open the page with a scripted server; records its requests and console errors."""
    with ExitStack() as stack:

        def opened(*, width: int = 1280, scheme: str = "light", **options: Any) -> Any:
            server = stack.enter_context(start(**{"seconds": 0.002, **options}))
            page = stack.enter_context(browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme))
            page.set_default_timeout(15_000)
            page.server, page.asked, page.told = server, [], []
            page.on("request", lambda request: page.asked.append(request.url))
            page.on("console", lambda message: page.told.append(message.text))
            page.accept = lambda dialog: dialog.accept()
            page.on("dialog", page.accept)
            page.on("pageerror", lambda error: page.told.append(str(error)))
            page.goto(server.url)
            return page

        yield opened


def ask(page: Any, text: str) -> Any:
    page.fill("#input", text)
    page.press("#input", "Enter")
    page.wait_for_selector("#stop", state="hidden")
    # A refused question leaves an empty answer and says why.
    page.wait_for_function(
        "() => document.querySelector('#problem').checkVisibility()"
        " || [...document.querySelectorAll('li.assistant .said')].at(-1)?.innerText"
    )
    return page.locator("li.assistant .said").last


def known(page: Any) -> None:
    page.wait_for_selector("#model-name:not(:empty)")


def test_answer_streams_in_from_the_server_alone(show):
    page = show(says="yes, the cat sat on the mat")
    assert ask(page, "did it?").inner_text() == "yes, the cat sat on the mat"
    assert page.locator("li.user .said").inner_text() == "did it?"
    assert page.locator("#status").inner_text() == "The model said: yes, the cat sat on the mat"
    assert all(url.startswith(page.server.url) for url in page.asked)
    assert page.told == []


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_never_becomes_script(show, attack):
    page = show(says=attack)
    known(page)
    said = ask(page, attack)
    page.wait_for_timeout(100)
    assert page.evaluate("() => window.hurt") is None
    inside = "script, img, svg, iframe, style, [onerror], [onload], [onmouseover], a:not([href^='https://'])"
    assert page.locator("#messages").locator(inside).count() == 0
    assert said.inner_text().strip()
    assert page.locator("li.user .said").inner_text() == attack, "what was typed is shown as it was typed"
    assert all(url.startswith(page.server.url) for url in page.asked)
    page.reload()
    page.locator("#list .name").click()
    page.wait_for_selector("li.assistant")
    assert page.evaluate("() => window.hurt") is None


def test_stop_cancels_generation(show):
    page = show(seconds=0.03)
    page.fill("#input", "go on")
    page.press("#input", "Enter")
    page.wait_for_selector("li.assistant .said p")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop", state="hidden")
    page.server.until(lambda: page.server.worker.num_choices == 0, seconds=2)
    said = page.locator("li.assistant .said").inner_text()
    assert said
    assert (string.ascii_lowercase * 20).startswith(said)
    assert page.locator("li.assistant .note").inner_text() == "stopped"


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (429, {"message": "12 answers wait", "code": "queue_full"},
         "The server is busy with other answers. Try again in 7 s."),
        (400, {"message": "max_tokens is 0", "param": "max_tokens"},
         "The server does not accept a setting: Max_tokens is 0. Change it in Settings."),
        (500, {"message": "<img src=x onerror=window.hurt=1>"},
         "The server failed while it answered. Try again. <img src=x onerror=window.hurt=1>."),
    ],
)  # fmt: skip
def test_errors_are_readable(show, status, error, words):
    page = show(says="yes")
    answer = {"status": status, "json": {"error": error}, "headers": {"Retry-After": "7"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
    known(page)
    ask(page, "well?")
    assert page.locator("#problem").inner_text() == words


def test_names_never_become_script(show):
    page = show(says="yes")
    hurt = "<img src=x onerror=window.hurt=1>"
    entry = {"id": hurt, "object": "model", "created": 1, "owned_by": hurt, "mlxchat": {
        "rid": hurt, "step": hurt, "stage": hurt, "run": hurt, "published": hurt, "converses": True,
        "inputs": {hurt: hurt}, "metrics": {hurt: 1}, "scores": {hurt: 0.5}, "config": {hurt: hurt}, "seed": hurt,
        "git": {"commit": hurt}}}  # fmt: skip
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [entry]}))
    page.route("**/v1/models/**", lambda route: route.fulfill(json=entry))
    page.reload()
    known(page)
    page.get_by_role("button", name="Model:").click()
    page.wait_for_selector("#model-facts details")
    assert page.locator("img").count() == 1, "the logo"
    assert page.evaluate("() => window.hurt") is None


def test_conversations_are_kept_and_deleted_on_confirmation(show):
    page = show(says="yes")
    ask(page, "the first one")
    page.keyboard.press("Control+Shift+O")
    ask(page, "the second one")
    page.reload()
    assert page.locator("#list .name").all_inner_texts() == ["the second one", "the first one"]
    page.get_by_role("button", name="Delete “the first one”").click()
    assert page.locator("#list .name").all_inner_texts() == ["the second one"]


def test_model_and_settings_are_kept_and_sent(show):
    page = show(says="yes")
    known(page)
    page.get_by_role("button", name="Model:").click()
    page.wait_for_selector("#model-facts details")
    assert CHAT in page.locator("#model-facts").inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    page.fill("#set-seed", "3")
    page.fill("#set-system", "be brief")
    page.keyboard.press("Escape")
    page.reload()
    known(page)
    with page.expect_request("**/v1/chat/completions") as caught:
        ask(page, "well?")
    body = caught.value.post_data_json
    assert (body["model"], body["seed"]) == (CHAT, 3)
    assert body["messages"][0] == {"role": "system", "content": "be brief"}


def test_missing_key_opens_the_key_dialog(show):
    page = show(says="yes", api_key="secret")
    page.get_by_role("textbox", name="API key").fill("secret")
    page.get_by_role("button", name="Go on").click()
    known(page)
    assert ask(page, "well?").inner_text() == "yes"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 1280])
def test_page_fits_the_screen_with_enough_contrast(show, width, scheme):
    page = show(width=width, scheme=scheme, says=MARKDOWN + "\n\n" + "long" * 200)
    ask(page, "show me " + "w" * 300)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert weakest_contrast(page)[0] >= 4.5, weakest_contrast(page)
