"""A search's journal: it tells a search apart from others, and a process may die while writing at any byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import ConfigError, StoreError
from mlxchat.sweep.journal import Journal

STUDY = {"metric": "pretrain.val_bpb", "space": {"a": "float 0..1"}, "fixed": {"seed": 1, "b": 2.5}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three trials: done, failed, asked."""
    journal = Journal(tmp_path / "search" / "trials.jsonl")
    journal.begin(STUDY)
    journal.tell(journal.ask({"a": 0.1, "m": "d2"}), 1.5, {"metrics": {"x": 1.5}})
    journal.tell(journal.ask({"a": 0.2, "m": "d4"}), None, {"error": "no"})
    journal.ask({"a": 1e-7, "m": "d2"})
    return journal.path


def state(path: Path) -> list[Any]:
    return [(trial.number, trial.values, trial.status, trial.value, trial.row) for trial in Journal(path).trials]


def test_what_was_written_is_read(path: Path) -> None:
    (first, second, third) = Journal(path).trials
    assert (first.status, first.value, first.values) == ("done", 1.5, {"a": 0.1, "m": "d2"})
    assert first.row is not None
    assert first.row["metrics"] == {"x": 1.5}
    assert (second.status, second.value) == ("failed", None)
    assert (third.status, third.values["a"]) == ("asked", 1e-7)
    assert Journal(path).waiting == third


def test_a_journal_cut_at_any_byte_is_what_it_was_before_its_last_line(path: Path) -> None:
    text = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(text) if byte == ord("\n")]
    before = {0: []}
    for end in ends:
        path.write_bytes(text[:end])
        before[end] = state(path)
    for cut in range(len(text)):
        path.write_bytes(text[:cut])
        assert state(path) == before[max(end for end in before if end <= cut)], cut


def test_a_torn_line_is_gone_when_the_next_one_is_there(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])
    journal = Journal(path)
    journal.ask({"a": 0.5, "m": "d2"})
    assert [trial.values["a"] for trial in Journal(path).trials] == [0.1, 0.2, 0.5]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_line_that_could_not_be_written_whole_leaves_the_journal_usable(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    assert journal.waiting is not None
    monkeypatch.setenv("MLXCHAT_CRASH_AT", "search.written")
    monkeypatch.setenv("MLXCHAT_CRASH_ERROR", "ENOSPC")
    monkeypatch.setattr("mlxchat.runner.crash._passed", {})
    with pytest.raises(StoreError, match="No space left"):
        journal.tell(journal.waiting, 2.0, {})
    monkeypatch.delenv("MLXCHAT_CRASH_AT")
    journal.tell(journal.waiting, 2.0, {})
    assert [trial.status for trial in Journal(path).trials] == ["done", "failed", "done"]
    assert sum('"tell": 3' in line for line in path.read_text().splitlines()) == 1


@pytest.mark.parametrize("line", [0, 2, 4])
@pytest.mark.parametrize("damage", [b"not json", b"{}", b'{"tell": 99, "value": 1}', b'{"ask": 7, "values": {}}'])
def test_a_damaged_line_in_the_middle_is_refused_and_named(path: Path, line: int, damage: bytes) -> None:
    lines = path.read_bytes().splitlines()
    lines[line] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(StoreError, match=rf"line {line + 1} is damaged"):
        Journal(path)


def test_the_same_search_goes_on(path: Path) -> None:
    Journal(path).begin(STUDY)
    assert len(Journal(path).trials) == 3


def test_another_search_is_refused_with_what_differs(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Journal(path).begin({**STUDY, "space": {"a": "float 0..2"}, "fixed": {"seed": 1, "b": 3}})
    assert "fixed.b: 2.5 → 3" in str(caught.value)
    assert "space.a: float 0..1 → float 0..2" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert "sweep.name=NAME" in str(caught.value)
