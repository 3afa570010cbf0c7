"""Progress lines: one line of a terminal, and the time that is left."""

import io

import pytest
from rich.console import Console

from mlxchat.runner import progress
from mlxchat.runner.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 120])
def test_line_is_cut_after_the_eta(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    out = io.StringIO()
    with Progress("pretrain", 340, "iterations", stream=Terminal()) as bar:
        for done, now in ((1, 0.0), (86, 100.0)):  # noqa: B007 (`now` is the clock)
            bar.update(done, loss="4.751", speed="4.02k tok/s", memory="571.2 MB")
        Console(file=out, width=width).print(bar.bar.get_renderable())
    (line,) = out.getvalue().splitlines()
    assert "86/340 iterations  eta 4m59s" in line
    assert ("loss 4.751  4.02k tok/s  571.2 MB" in line) == (width == 120)


def test_eta_ignores_the_first_unit(monkeypatch):
    # After one iteration of 54 s, 53 of which compiled, five hours were predicted for a training of two minutes.
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    out = io.StringIO()
    with Progress("pretrain", 101, "iterations", stream=out) as line:
        for done, now in ((1, 50.0), (2, 60.0), (11, 70.0)):  # noqa: B007 (`now` is the clock)
            line.update(done)
    found = [text.rpartition("  ")[2].strip() for text in out.getvalue().splitlines()]
    assert found == ["1/101 iterations", "eta 16m30s", "eta 3m00s"]
