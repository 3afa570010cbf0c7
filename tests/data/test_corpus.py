"""Documents of local files in three formats, and the Hub without a network."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxchat.data.sources import gather_documents, read_file
from mlxchat.errors import DataError


def read(path: Path) -> list[str]:
    return list(read_file(path))


def jsonl(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\nstill one\n\n\ntwo é", ["one\n\nstill one", "two é"]),
        ("a.jsonl", '{"text": "one\\ntwo", "id": 1}\n{"text": "é"}\n', ["one\ntwo", "é"]),
        # Web text has these line separators; JSON allows them in strings.
        ("a.jsonl", '{"text": "one\u2028two\u2029three\u0085four"}', ["one\u2028two\u2029three\u0085four"]),
        ("a.jsonl", '\ufeff{"text": "one"}\n{"text": "t\\ud800wo"}\n', ["one", "t?wo"]),
    ],
    ids=["txt", "jsonl", "separators", "byte order mark, surrogate"],
)
def test_text_and_jsonl_files_are_read(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read(tmp_path / name) == expected


def test_all_invalid_jsonl_lines_are_listed(tmp_path):
    lines = ['{"text": "good"}', "{", '{"txt": "x"}', '["text"]', "5", '{"text": 5}', '{"text": null}', "[" * 100_000]
    with pytest.raises(DataError, match=r"a\.jsonl: lines 2, 3, 4, 5, 6, 7, 8 are not JSON objects"):
        read(jsonl(tmp_path / "a.jsonl", *lines))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_missing_and_invalid_files_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 neither text nor parquet")
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)
    with pytest.raises(DataError, match=r"expected a \.txt, \.jsonl or \.parquet file"):
        read(tmp_path / "a.csv")


@pytest.fixture
def three_files(tmp_path: Path) -> list[str]:
    """Three files of twenty documents, one of them also with blank and null ones."""
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"text {number}" for number in range(20)))
    jsonl(tmp_path / "b.jsonl", *(json.dumps({"text": f"json {number}"}) for number in range(20)), '{"text": "  "}')
    table = pa.table({"text": [*(f"parquet {number}" for number in range(20)), None]})
    pq.write_table(table, tmp_path / "c.parquet")
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet")]


def test_files_are_gathered_without_blank_documents_in_the_seeds_order(three_files):
    (documents, sources), (same, _), (other, _) = (
        gather_documents([], three_files, document_chars=None, seed=seed) for seed in (0, 0, 1)
    )
    assert documents == same != other
    assert sorted(documents) == sorted(
        f"{kind} {number}" for kind in ("text", "json", "parquet") for number in range(20)
    )
    for path, source in zip(map(Path, three_files), sources, strict=True):
        assert source["name"] == path.name
        assert hashlib.sha256(path.read_bytes()).hexdigest() in source["sha256"]


def test_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n\n \n")
    for paths in ([], [str(tmp_path / "a.txt")]):
        with pytest.raises(DataError, match="corpus is empty"):
            gather_documents([], paths, document_chars=None, seed=0)
