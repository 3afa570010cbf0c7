"""The files of examples."""

import json
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


def test_examples_round_trip(tmp_path):
    write_examples(tmp_path / "examples.parquet", ROWS)
    assert list(read_examples(tmp_path)) == ROWS
    details = pq.read_table(tmp_path / "examples.parquet").column("details").to_pylist()
    assert json.loads(details[1]) == ROWS[1]["details"]
    write_examples(tmp_path / "again", iter(ROWS))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "examples.parquet").read_bytes()
    write_examples(tmp_path / "examples.parquet", [])
    assert list(read_examples(tmp_path)) == []


def test_damaged_and_missing_examples_are_reported(tmp_path):
    with pytest.raises(DataError, match=r"only evaluations .* and RL do"):
        list(read_examples(tmp_path))
    (tmp_path / "examples.parquet").write_bytes(b"{damaged")
    with pytest.raises(DataError, match="cannot be read"):
        list(read_examples(tmp_path))
