"""The files of examples."""

from typing import Any

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


def test_examples_round_trip_in_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_examples(tmp_path / folder / "examples.parquet", iter(ROWS))
        assert list(read_examples(tmp_path / folder)) == ROWS
    assert len({(tmp_path / folder / "examples.parquet").read_bytes() for folder in "ab"}) == 1


def test_damaged_and_missing_examples_are_reported(tmp_path):
    with pytest.raises(DataError, match=r"only evaluations .* and RL do"):
        list(read_examples(tmp_path))
    (tmp_path / "examples.parquet").write_bytes(b"{damaged")
    with pytest.raises(DataError, match="cannot be read"):
        list(read_examples(tmp_path))
