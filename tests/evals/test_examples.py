"""What was asked and answered is kept, and comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mlxchat.errors import DataError
from mlxchat.evals.examples import read_examples, write_examples

ROWS: list[dict[str, Any]] = [
    {
        "task": "gsm8k", "index": 0, "seed": None, "prompt": "Wie viele Äpfel?", "output": "#### 4\u2028",
        "expected": "4", "verdict": True, "tokens": 3, "details": {"finished": True},
    },
    {
        "task": "core/copa", "index": 7, "seed": 2, "prompt": "", "output": "", "expected": "x", "verdict": False,
        "tokens": 0, "details": {"losses": [0.1, None], "cropped": False},
    },
]  # fmt: skip


def test_examples_come_back_as_they_were(tmp_path: Path) -> None:
    write_examples(tmp_path / "examples.parquet", ROWS)
    assert list(read_examples(tmp_path)) == ROWS


def test_other_programs_can_read_them(tmp_path: Path) -> None:
    write_examples(tmp_path / "examples.parquet", ROWS)
    table = pq.read_table(tmp_path / "examples.parquet")
    assert table.column_names == [
        "task", "index", "seed", "prompt", "output", "expected", "verdict", "tokens", "details",
    ]  # fmt: skip
    assert json.loads(table.to_pylist()[1]["details"]) == ROWS[1]["details"]


def test_equal_examples_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_examples(tmp_path / name, iter(ROWS))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_examples_are_a_file_too(tmp_path: Path) -> None:
    write_examples(tmp_path / "examples.parquet", [])
    assert list(read_examples(tmp_path)) == []


def test_examples_of_older_artifacts_are_read(tmp_path: Path) -> None:
    line = {"task": "facts", "index": 3, "question": "q", "answer": "a", "correct": False}
    (tmp_path / "examples.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (row,) = read_examples(tmp_path)
    assert (row["task"], row["prompt"], row["output"], row["verdict"]) == ("facts", "q", "a", False)


@pytest.mark.parametrize("name", ["examples.parquet", "examples.jsonl"])
def test_damaged_examples_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{damaged")
    with pytest.raises(DataError, match="cannot be read"):
        list(read_examples(tmp_path))


def test_a_folder_without_examples_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only evaluations .* and RL do"):
        list(read_examples(tmp_path))
