"""The README's pictures of the page and of the terminal chat, taken of the real ones: `make pictures` runs this.

Every question names a seed or is greedy, so the same model gives the same pictures.
"""

import argparse
import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any

MLXCHAT = Path(sys.executable).with_name("mlxchat")
QUESTIONS = [
    "Mia has 12 candles and buys 7 more. How many candles does Mia have now?",
    "What is the capital of France?",
]
TYPED = [*QUESTIONS, "/temperature 0.7", "/retry"]
COLUMNS = 92


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("settings", nargs="*", help="outputs=DIR; all else is no concern of chat")
    options = parser.parse_args()
    # The terminal is taken in a folder of its own, where a conversation is saved.
    given = [setting.removeprefix("outputs=") for setting in options.settings if setting.startswith("outputs=")]
    outputs = f"outputs={Path((given or ['outputs'])[-1]).resolve()}"
    take_page(options.folder, options.chromium, [outputs])
    with tempfile.TemporaryDirectory() as folder:
        take_terminal(options.folder.resolve() / "chat.svg", Path(folder), [outputs])


def take_page(folder: Path, chromium: str, settings: list[str]) -> None:
    """Write serve.png, and serve-phone.png in the dark."""
    from playwright.sync_api import sync_playwright

    command = [str(MLXCHAT), "serve", "--port", "0", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        try:
            url = next(found[0] for line in server.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
            with sync_playwright() as player:
                browser = player.chromium.launch(
                    executable_path=shutil.which(chromium) or chromium, args=["--no-sandbox"]
                )
                for name, width, height, scheme, scale in (
                    ("serve.png", 1100, 700, "light", 1.0), ("serve-phone.png", 375, 700, "dark", 1.5)
                ):  # fmt: skip
                    view: Any = {"width": width, "height": height}
                    page = browser.new_page(viewport=view, color_scheme=scheme, device_scale_factor=scale)
                    page.goto(url)
                    page.evaluate(
                        """() => localStorage.setItem('mlxchat.settings', '{"temperature": 0, "seed": "1"}')"""
                    )
                    page.reload()
                    page.wait_for_selector("#model-name:not(:empty)")
                    for asked, question in enumerate(QUESTIONS, start=1):
                        page.fill("#input", question)
                        page.press("#input", "Enter")
                        answered = (
                            f":nth-match(li.assistant:not(.going) .actions button:has-text('Regenerate'), {asked})"
                        )
                        page.wait_for_selector(answered, timeout=120_000)
                    for fold in page.locator(".tool summary").all()[:1]:
                        fold.click()
                    # What differs from one time to the next.
                    page.evaluate("() => document.querySelectorAll('.assistant .note').forEach(note => note.remove())")
                    page.focus("#input")
                    page.screenshot(path=folder / name)
                browser.close()
        finally:
            server.terminate()


def take_terminal(picture: Path, folder: Path, settings: list[str]) -> None:
    """Write a picture of a terminal after some questions and commands."""
    from rich.console import Console
    from rich.text import Text

    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ |= {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        os.execv(MLXCHAT, ["mlxchat", "chat", *settings])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, COLUMNS, 0, 0))
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text("$ mlxchat chat", style="bold"))
        first = _read_until(terminal, "› ", 60)
        told = re.search(r"\S+\. /help lists the commands\.", first)
        assert told, first
        console.print(told[0], highlight=False)
        for line in TYPED:
            os.write(terminal, line.encode() + b"\r")
            # Between the end of one line's editing and the beginning of the next.
            told_all = _read_until(terminal, "\x1b\\[\\?2004l.*\x1b\\[\\?2004h", 120)
            answer = told_all.partition("\x1b[?2004l")[2].partition("\x1b[?2004h")[0]
            answer = re.sub(r"\x1b\[\?\d+[hl]|\x1b\[\d*[JACDn]|\r", "", answer).rstrip("\n")
            console.print(Text.assemble(("you › ", "bold blue"), line))
            console.print(Text.from_ansi(answer))
        os.write(terminal, b"/quit\r")
        os.waitpid(process, 0)
        console.save_svg(str(picture), title="mlxchat chat", unique_id="mlxchat")


def _read_until(terminal: int, mark: str, seconds: float) -> str:
    found, ends = "", time.monotonic() + seconds
    while not re.search(mark, found, re.DOTALL):
        assert time.monotonic() < ends, f"{mark!r} did not come: {found!r}"
        if select.select([terminal], [], [], 0.1)[0]:
            found += os.read(terminal, 65536).decode(errors="replace")
    while select.select([terminal], [], [], 0.2)[0]:
        found += os.read(terminal, 65536).decode(errors="replace")
    return found


if __name__ == "__main__":
    main()
