"""Lines of a waiting process, and the end of its wait."""

import json
from pathlib import Path

import pytest

from mlxchat.errors import Interrupted
from mlxchat.runner import run as run_module
from mlxchat.runner.run import Run, Waiting
from mlxchat.store.attempts import iteration
from mlxchat.store.environment import Environment
from mlxchat.store.files import Records

OWNER = {"pid": 12, "host": "alpha", "run": "run7", "step": "train"}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(tmp_path: Path, said: list[str]) -> Run:
    environment = Environment(lambda: {})
    return Run(folder=tmp_path / "run", seed=1, overrides=[], environment=environment, say=said.append)


def test_waiting_line_follows_the_holders_progress(run, said, tmp_path, monkeypatch):
    lock, work = tmp_path / "x.lock", tmp_path / "work"
    lock.write_text(json.dumps(OWNER))
    metrics = Records(work / "ckpt" / "records" / "metrics.jsonl")
    begin, look = Waiting(run, "train", lock, doing="is making it", work=work).calls
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
def test_stop_ends_the_wait(number, code, run, tmp_path):
    _, look = Waiting(run, "train", tmp_path / "x.lock", doing="is making it").calls
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
