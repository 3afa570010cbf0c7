"""Progress lines at any width of the terminal."""

import io
import re

import pytest
from rich.console import Console

from mlxchat.runner import progress
from mlxchat.runner.progress import Progress

TRAINING = {"loss": "4.751", "speed": "4.02k tok/s", "mfu": "50%", "memory": "571.2 MB"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(width: int, monkeypatch: pytest.MonkeyPatch, title: str = "pretrain", **numbers: str) -> str:
    """Return the line of a training that is shown at 86 of 340 iterations."""
    monkeypatch.setenv("COLUMNS", str(width))
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(title, 340, "iterations", stream=Terminal()) as bar:
        bar.update(1, **numbers)
        now = 100.0
        bar.update(86, **numbers)
        out = io.StringIO()
        Console(file=out, width=width).print(bar.bar.get_renderable())
    lines = out.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 1, lines
    assert len(lines[0]) <= width
    return lines[0]


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (40, r"pretrain +86/340 iterations  eta 4m59s"),
        (80, r"pretrain +━+─+ 86/340 iterations  eta 4m59s  loss 4\.751"),
        (120, r"loss 4\.751  4\.02k tok/s  mfu 50%  571\.2 MB"),
    ],
)
def test_line_is_cut_after_the_eta(width, line, monkeypatch):
    assert re.search(line, shown(width, monkeypatch, **TRAINING))


def test_eta_ignores_the_first_unit(monkeypatch):
    # After one iteration of 54 s, 53 of which compiled, five hours were predicted for a training of two minutes.
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    out = io.StringIO()
    with Progress("pretrain", 101, "iterations", stream=out) as line:
        for done, now in ((1, 50.0), (2, 60.0), (11, 70.0)):  # noqa: B007 (`now` is the clock)
            line.update(done)
    assert [text.rpartition("  ")[2].strip() for text in out.getvalue().splitlines()] == [
        "1/101 iterations", "eta 16m30s", "eta 3m00s",
    ]  # fmt: skip
