"""A corpus on the Hub: pinning, choice of files, measured density, and downloads ahead of the reader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.models import composed
from kit.text import parquet
from mlxchat.config.schema import HubConfig
from mlxchat.data.sources import Corpus, pin_corpus

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
