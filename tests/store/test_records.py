"""JSON lines that a kill may cut anywhere, and the list of a step's executions made from them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxchat.store import attempts
from mlxchat.store.files import Records, now

records = st.lists(
    st.fixed_dictionaries({"iteration": st.integers(0, 9), "text": st.text(max_size=8), "loss": st.floats(0, 9)}),
    max_size=5,
)


@given(records)
def test_what_was_appended_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, written: list[dict[str, Any]]
) -> None:
    log = Records(tmp_path_factory.mktemp("log") / "deep" / "metrics.jsonl")
    for record in written:
        log.append(record)
    assert log.read() == written


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert Records(tmp_path / "metrics.jsonl").read() == []


WRITTEN = [{"iteration": index, "text": f"é {index} ☃"} for index in range(3)]


def cut_files(tmp_path: Path) -> list[tuple[int, Records]]:
    """Return the file of WRITTEN cut at every byte, each with the number of its whole records."""
    whole = Records(tmp_path / "whole.jsonl")
    ends = [0]
    for record in WRITTEN:
        whole.append(record)
        ends.append(whole.path.stat().st_size)
    found = []
    for length in range(ends[-1] + 1):
        cut = Records(tmp_path / f"{length}.jsonl")
        cut.path.write_bytes(whole.path.read_bytes()[:length])
        found.append((sum(length >= end - 1 for end in ends[1:]), cut))
    return found


def test_a_file_cut_anywhere_gives_the_records_before_the_cut(tmp_path: Path) -> None:
    for num_whole, cut in cut_files(tmp_path):
        assert cut.read() == WRITTEN[:num_whole]


def test_a_record_after_a_cut_line_is_not_lost(tmp_path: Path) -> None:
    for num_whole, cut in cut_files(tmp_path):
        cut.append({"iteration": 9})
        assert cut.read() == [*WRITTEN[:num_whole], {"iteration": 9}]


def test_truncation_drops_what_came_after_an_iteration_and_a_cut_line(tmp_path: Path) -> None:
    log = Records(tmp_path / "metrics.jsonl")
    for record in [
        {"note": "no iteration"},
        {"iteration": 1},
        {"iteration": 2, "val": 1},
        {"iteration": 2},
        {"iteration": 3},
    ]:
        log.append(record)
    with log.path.open("a") as file:
        file.write('{"iteration": 4, "lo')
    log.truncate(2)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"note": "no iteration"}, {"iteration": 1}, {"iteration": 2, "val": 1}, {"iteration": 2},
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [log.path]


def test_times_sort_as_texts() -> None:
    assert now() <= now()
    assert now().endswith("+00:00")


def test_an_execution_without_an_end_was_killed(tmp_path: Path) -> None:
    attempts.start(tmp_path, "run1", "sft")
    second = attempts.start(tmp_path, "run2", "sft")
    attempts.finish(tmp_path, second, "done", None, 7)
    killed, done = attempts.read(tmp_path)
    assert (killed["outcome"], killed["ended"], killed["seconds"], killed["run"]) == ("killed", None, None, "run1")
    assert (done["outcome"], done["resumed_from"], done["run"], done["attempt"]) == ("done", 7, "run2", 2)
    assert done["seconds"] >= 0


def test_an_execution_says_who_and_where_it_was(tmp_path: Path) -> None:
    attempts.start(tmp_path, "run1", "sft")
    (record,) = attempts.read(tmp_path)
    assert {"started", "ended", "outcome", "pid", "host", "seconds"} <= record.keys()
    assert (record["step"], record["pid"], record["host"]) == ("sft", os.getpid(), os.uname().nodename)


def test_executions_are_told_apart_after_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    attempts.start(tmp_path, "run1", "sft")
    path = tmp_path / "attempts.jsonl"
    whole = path.read_bytes()
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        number = attempts.start(tmp_path, "run2", "sft")
        attempts.finish(tmp_path, number, "failed", "oh", None)
        last = attempts.read(tmp_path)[-1]
        assert (last["run"], last["outcome"], last["error"]) == ("run2", "failed", "oh"), f"cut at byte {length}"


def test_there_are_no_records_below_a_file(tmp_path: Path) -> None:
    """Work is looked through while others leave files in it for an instant: that ended runs of eight processes."""
    (tmp_path / "probe").touch()
    assert Records(tmp_path / "probe" / "attempts.jsonl").read() == []
