"""Lines of a waiting process, and the end of its wait."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import Interrupted
from mlxchat.runner import run as run_module
from mlxchat.runner.run import Run
from mlxchat.store import locks
from mlxchat.store.attempts import iteration
from mlxchat.store.environment import Environment
from mlxchat.store.files import Records

OWNER = {"pid": 12, "host": "alpha", "run": "run7", "step": "train"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(folder=tmp_path / "run", seed=1, data_seed=1, overrides=[], environment=Environment(lambda: {}))


def waiting(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[..., None], Callable[[], None]]:
    """Return what is called when a wait for a step's lock begins, and repeatedly while it lasts."""
    calls: list[Any] = []

    def held(path: Path, owner: dict[str, Any], *given: Any) -> Any:
        calls.extend(given)
        return nullcontext(False)

    monkeypatch.setattr(locks, "hold", held)
    with run_module.hold(run, "train", tmp_path / "x.lock", "is making it", work=tmp_path / "work"):
        return calls[0], calls[1]


def test_waiting_line_follows_the_holders_progress(run, tmp_path, monkeypatch):
    said: list[str] = []
    run.say = said.append
    (tmp_path / "x.lock").write_text(json.dumps(OWNER))
    metrics = Records(tmp_path / "work" / "ckpt" / "records" / "metrics.jsonl")
    begin, look = waiting(run, tmp_path, monkeypatch)
    begin(OWNER)
    look()
    assert len(said) == 1, "not again before its time"
    monkeypatch.setattr(run_module, "REFRESH_SECONDS", 0.0)
    look()
    assert len(said) == 1, "not again while it says the same"
    for number in (1, 2):
        metrics.append({"iteration": number})
        look()
    who = "train      waits: process 12 on alpha (run run7) is making it"
    assert said == [who, f"{who}, at iteration 1", f"{who}, at iteration 2"]


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_stop_ends_the_wait(number, code, run, tmp_path, monkeypatch):
    _, look = waiting(run, tmp_path, monkeypatch)
    look()
    run.request_stop(number)
    with pytest.raises(Interrupted, match=r"stopped while train waited\. The same command continues") as caught:
        look()
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", None), (b'{"iteration": 3}\n{"iter', 3), (b'{"loss": 1}\n', None), (b"\xff\n[]\n", None)],
)
def test_last_iteration_is_read_from_partial_records(content, expected, tmp_path):
    (tmp_path / "ckpt" / "records").mkdir(parents=True)
    (tmp_path / "ckpt" / "records" / "metrics.jsonl").write_bytes(content)
    assert iteration(tmp_path) == expected
    assert iteration(tmp_path / "nothing") is None
