"""Progress lines: the time that is left."""

import io

from mlxchat.runner import progress
from mlxchat.runner.progress import Progress


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
