"""Documents of local files in three formats, and their shards."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit.models import composed
from kit.text import DOCUMENTS, parquet
from mlxchat.config.schema import HubConfig
from mlxchat.data.sources import Corpus, gather_documents, pin_corpus, read_file, text_files
from mlxchat.errors import ConfigError


def read(path: Path) -> list[str]:
    return list(read_file(path))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\nstill one\r\n\r\n\r\ntwo é", ["one\n\nstill one", "two é"]),
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


def test_folders_and_patterns_stand_for_their_text_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "town" / "old").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl", "old/c.txt", "notes.md", ".hidden.txt"):
        (tmp_path / "town" / name).write_text('{"text": "one"}')
    assert text_files(["town"]) == [Path("town/a.jsonl"), Path("town/b.txt"), Path("town/old/c.txt")]
    assert text_files(["town/*.txt", "town/b.txt"]) == [Path("town/b.txt")]
    assert text_files(["town/**/*.txt"]) == [Path("town/b.txt"), Path("town/old/c.txt")]
    (tmp_path / "a[1].txt").write_text("x")
    assert text_files(["a[1].txt"]) == [Path("a[1].txt")]
    with pytest.raises(ConfigError):
        text_files(["town/*.parquet"])


def test_long_text_files_are_split_at_sentence_ends(tmp_path):
    """Bug: a book in one .txt was one document, and document_chars applied to packages only."""
    sentence = "The mill of Quellbrunn stands by the river. "
    (tmp_path / "book.txt").write_text(sentence * 100)
    (tmp_path / "whole.jsonl").write_text(json.dumps({"text": sentence * 100}))
    documents, _ = gather_documents([], [str(tmp_path)], document_chars=300, seed=0)
    assert sorted(map(len, documents))[-1] == 4400, "a line of a .jsonl is a document"
    parts = [each for each in documents if len(each) < 4400]
    assert all(each.strip().endswith("river.") and len(each) <= 300 for each in parts)
    assert sum(each.count("mill") for each in parts) == 100


@pytest.fixture
def three_files(tmp_path: Path) -> list[str]:
    """Three files of twenty documents, one of them also with blank and null ones."""
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"text {number}" for number in range(20)))
    lines = [json.dumps({"text": text}) for text in [*(f"json {number}" for number in range(20)), "  "]]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
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


def test_shards_have_nanochats_format_and_every_document_once(hundred):
    corpus = Corpus.open(hundred)
    assert list(corpus.documents("validation")) == DOCUMENTS[:10]
    assert list(corpus.documents("train")) == DOCUMENTS[10:]
    assert [shard.name for shard in corpus.train] == [f"shard_0000{index}.parquet" for index in range(3)]
    assert [shard.count() for shard in corpus.train] == [40, 40, 10]
    metadata = pq.ParquetFile(hundred / "shard_00000.parquet").metadata
    assert metadata.schema.names == ["text"]
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [7, 7, 7, 7, 7, 5]


# A corpus on the Hub: pinning, choice of files, measured density, and downloads ahead of the reader

NAME = "org/texts"


def texts(shard: int, count: int = 30) -> list[str]:
    return [f"shard {shard} document {number} " + "word " * (number % 7) for number in range(count)]


@pytest.fixture
def five(hub: Any) -> Any:
    """Five files of thirty documents; the last is for validation."""
    return hub.add(NAME, {f"shard_{index:05d}.parquet": parquet(texts(index)) for index in range(5)})


@pytest.fixture
def pin(tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        """Write the artifact; return its folder."""
        values: dict[str, Any] = {
            "repository": NAME, "revision": "main", "train_files": "shard_*.parquet", "num_train_files": None,
            "validation_files": "shard_00004.parquet", "column": "text",
        }  # fmt: skip
        out = tmp_path / f"corpus-{len(list(tmp_path.glob('corpus-*')))}"
        out.mkdir()
        pin_corpus(HubConfig(**(values | changes)), out, 12, None)
        return out

    return make


def test_artifact_pins_commit_and_files_without_text(hub, five, pin):
    folder = pin()
    assert [path.name for path in folder.iterdir()] == ["corpus.json"]
    listing = json.loads((folder / "corpus.json").read_text())
    assert listing["hub"] == {"repository": NAME, "kind": "dataset", "revision": five.commit, "column": "text"}
    assert [row[:2] for row in listing["shards"]] == [
        [name, len(data)] for name, data in five.files.items() if name != "shard_00004.parquet"
    ]
    assert [row[0] for row in listing["validation"]] == ["shard_00004.parquet"]
    corpus = Corpus.open(folder)
    assert list(corpus.documents("train")) == [text for index in range(4) for text in texts(index)]
    assert list(corpus.documents("validation")) == texts(4)
    assert len(Corpus.open(pin(num_train_files=2)).train) == 2


def test_first_documents_are_held_out_without_validation_files(hub, five, pin):
    corpus = Corpus.open(pin(validation_files=None))
    assert list(corpus.documents("validation")) == texts(0)[:12]
    share = len(five.files["shard_00000.parquet"]) * 12 / len(texts(0))
    assert corpus.chars_per_byte == pytest.approx(sum(map(len, texts(0)[:12])) / share)
    assert list(corpus.documents("train"))[:19] == [*texts(0)[12:], texts(1)[0]]
    assert corpus.train[0].count() == 18
    rows = [shard.identity().get("rows") for shard in (*corpus.validation, *corpus.train[:2])]
    assert rows == [[0, 12], [12, None], None]


@pytest.mark.parametrize(("name", "shards"), [("fineweb_edu", 1823), ("climbmix", 6543)])
def test_nanochats_corpora_hold_out_the_last_shard(hub, name, shards):
    """`shard_00000.parquet` to `MAX_SHARD`, as in nanochat's dataset.py, which validates on the last one."""
    config = composed(f"corpus={name}").corpus
    names = [f"shard_{number:05d}.parquet" for number in range(shards)]
    hub.add(config.hub.repository, dict.fromkeys([".gitattributes", "README.md", *names], b"x"))
    corpus = Corpus.listed(config.hub, config.validation_documents)
    assert [shard.name for shard in corpus.train] == names[:-1]
    assert [shard.name for shard in corpus.validation] == names[-1:]


def test_needed_files_are_the_first_with_so_many_characters(hub, five, pin):
    corpus = Corpus.open(pin())
    density = sum(map(len, texts(4))) / len(five.files["shard_00004.parquet"])
    assert corpus.chars_per_byte == pytest.approx(density)
    sizes = [len(five.files[f"shard_{index:05d}.parquet"]) for index in range(4)]
    for count in range(1, 5):
        chars = corpus.chars_per_byte * (sum(sizes[:count]) - 1)
        assert [file.bytes for file in corpus.first(chars)] == sizes[:count]
    assert len(corpus.first(1e12)) == 4
