"""Rows of parquet files: order and memory."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxchat.errors import DataError
from mlxchat.tasks.downloads import Rows


def write(path: Path, values: list[str], **options: int) -> Path:
    pq.write_table(pa.table({"text": values, "other": list(range(len(values)))}), path, **options)
    return path


def texts(rows: Rows) -> list[str]:
    return [rows[index]["text"] for index in range(len(rows))]


def test_files_are_concatenated_without_a_seed(tmp_path):
    files = [write(tmp_path / "b", ["b0", "b1"]), write(tmp_path / "a", ["a0"])]
    assert texts(Rows(files, ["text"])) == ["b0", "b1", "a0"]


def test_seed_42_gives_the_order_of_datasets_shuffle(tmp_path):
    """As `datasets.Dataset.shuffle(seed=42)` orders six rows: nanochat's HumanEval rows show it."""
    rows = Rows([write(tmp_path / "a", list("012345"), row_group_size=2)], ["text"], seed=42)
    assert texts(rows) == list("325410")
    assert [rows.number(index) for index in range(6)] == [3, 2, 5, 4, 1, 0]


def test_table_is_memory_mapped_and_leaves_no_file(tmp_path, monkeypatch):
    values = [f"{n:07d}" * 100 for n in range(20_000)]  # 14 MB
    path = write(tmp_path / "a", values, row_group_size=500)
    cache = tmp_path / "cache"
    monkeypatch.setenv("MLXCHAT_CACHE", str(cache))
    before = pa.total_allocated_bytes()
    rows = Rows([path], ["text"], seed=1)
    assert pa.total_allocated_bytes() - before < 1 << 20
    assert sorted(texts(rows)) == values
    assert list(cache.iterdir()) == []


def test_missing_columns_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match="has no column answer; it has text, other"):
        Rows([write(tmp_path / "a", ["x"])], ["text", "answer"])
    damaged = tmp_path / "b"
    damaged.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        Rows([damaged], ["text"])


def test_empty_file_has_no_rows(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a")
    assert len(Rows([tmp_path / "a"], ["text"], seed=42)) == 0
