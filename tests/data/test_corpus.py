"""Documents of local files of three kinds; the Hub without a network (with one: test_hub_corpus.py)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit.commands import CommandLine
from mlxchat.data.sources import gather_documents, read_file
from mlxchat.errors import DataError


def read(path: Path) -> list[str]:
    return list(read_file(path))


def jsonl(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


# Local files


def test_a_text_file_is_cut_at_two_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\nstill one\n\n\ntwo é", encoding="utf-8")
    assert read(path) == ["one\n\nstill one", "two é"]


def test_a_jsonl_file_gives_its_text_fields(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", '{"text": "one\\ntwo", "id": 1}', '{"text": "é"}')
    assert read(path) == ["one\ntwo", "é"]


def test_a_jsonl_line_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    """JSON allows U+2028, U+2029 and U+0085 in strings as they are, and text from the web has them."""
    text = "one\u2028two\u2029three\u0085four"
    path = jsonl(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False))
    assert read(path) == [text]


def test_a_parquet_file_gives_its_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["one", "two", "é"]}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == ["one", "two", "é"]


def test_every_bad_line_of_a_jsonl_file_is_listed(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", '{"text": "good"}', "{", '{"txt": "x"}', '["text"]', "5", '{"text": 5}', '{"text": null}'
    )
    with pytest.raises(DataError, match=r"a\.jsonl: lines 2, 3, 4, 5, 6, 7 are"):
        read(path)


def test_a_jsonl_file_may_begin_with_a_byte_order_mark_and_hold_half_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "t\\ud800wo"}\n')
    assert read(tmp_path / "a.jsonl") == ["one", "t?wo"]


def test_a_jsonl_line_that_is_nested_too_deeply_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + "[" * 100_000)
    with pytest.raises(DataError, match="lines 2 are no JSON objects"):
        read(tmp_path / "a.jsonl")


def test_a_parquet_file_without_the_column_lists_those_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"story": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match='no column "text"; there are story, id'):
        read(tmp_path / "a.parquet")


def test_empty_cells_of_a_parquet_column_are_left_out(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    documents, _ = gather_documents([], [str(tmp_path / "a.parquet")], document_chars=None, seed=0)
    assert sorted(documents) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 neither text nor parquet")
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a \.txt, \.jsonl or \.parquet file"):
        read(tmp_path / "a.csv")


@pytest.fixture
def three_files(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"text {number}" for number in range(20)))
    jsonl(tmp_path / "b.jsonl", *(json.dumps({"text": f"json {number}"}) for number in range(20)), '{"text": "  "}')
    pq.write_table(pa.table({"text": [f"parquet {number}" for number in range(20)]}), tmp_path / "c.parquet")
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet")]


def test_documents_of_all_files_are_gathered_and_blank_ones_left_out(three_files: list[str]) -> None:
    documents, _ = gather_documents([], three_files, document_chars=None, seed=0)
    assert sorted(documents) == sorted(
        f"{kind} {number}" for kind in ("text", "json", "parquet") for number in range(20)
    )


def test_a_seed_decides_the_order(three_files: list[str]) -> None:
    first, same, other = (gather_documents([], three_files, document_chars=None, seed=seed)[0] for seed in (1, 1, 2))
    assert first == same
    assert first != other
    assert first != sorted(first)


def test_each_file_is_recorded_with_its_digest(three_files: list[str]) -> None:
    _, sources = gather_documents([], three_files, document_chars=None, seed=0)
    for path, source in zip(map(Path, three_files), sources, strict=True):
        assert source["name"] == path.name
        assert hashlib.sha256(path.read_bytes()).hexdigest() in source["sha256"]


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="corpus is empty"):
        gather_documents([], [], document_chars=None, seed=0)


def test_files_with_blank_text_only_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n\n \n")
    with pytest.raises(DataError, match="corpus is empty"):
        gather_documents([], [str(tmp_path / "a.txt")], document_chars=None, seed=0)


# The Hub


def test_a_cold_cache_without_a_network_says_what_to_type(mlxchat: CommandLine, tmp_path: Path) -> None:
    environ = {
        "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "MLXCHAT_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = mlxchat("stage=corpus", f"outputs={tmp_path / 'outputs'}", "corpus=tinystories", environ=environ)
    assert done.returncode == 2
    assert "roneneldan/TinyStories" in done.stderr
    assert "mlxchat data fetch stage=corpus" in done.stderr
    assert "Traceback" not in done.stderr
