"""Tokenized documents: order, positions, and encoding on demand and ahead."""

import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kit.text import DOCUMENTS
from mlxchat.data import tokens as documents_module
from mlxchat.data.sources import Corpus, Shard
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import Documents, encode_shard
from mlxchat.errors import DataError


def texts(cursor: Documents, count: int, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(cursor.ids(address)[1:].tolist()) for address, _ in cursor.next(count)]


@pytest.mark.parametrize("count", [1, 7, 64])
def test_documents_repeat_in_order_and_count_epochs(hundred, read_documents, tokenizer, count):
    cursor, found = read_documents(hundred), []
    while len(found) < 200:
        found += texts(cursor, count, tokenizer)
        assert cursor.epoch == (len(found) - 1) // 90
    assert cursor.name((1, 3)) == "shard_00001.parquet document 3"
    assert found == (DOCUMENTS[10:] * 3)[: len(found)]


@pytest.mark.parametrize("position", [0, 1, 7, 39, 40, 89, 90, 91, 150])
def test_restored_cursor_continues_from_any_position(hundred, read_documents, position):
    first = read_documents(hundred)
    first.next(position)
    second = read_documents(hundred)
    second.restore(first.state())
    assert second.next(100) == first.next(100)
    assert second.epoch == first.epoch


def test_empty_shards_are_skipped_and_an_empty_corpus_refused(make_corpus, read_documents, tokenizer):
    folder = make_corpus(["held", "a", "b"], validation=1, shard=1, row_group=1)
    empty = pq.read_table(folder / "shard_00000.parquet").slice(0, 0)
    pq.write_table(empty, folder / "shard_00000.parquet")
    assert texts(read_documents(folder), 3, tokenizer) == ["b", "b", "b"]
    pq.write_table(empty.slice(0, 0), folder / "shard_00001.parquet")
    with pytest.raises(DataError, match=r"has no documents in shard_00000\.parquet"):
        read_documents(folder).next(1)


class Maker:
    """Encodes shards and records each call: shard, is_awaited, thread."""

    def __init__(self, corpus: Path, tokenizer: Tokenizer, work: Path) -> None:
        self.tokenizer, self.work, self.shards = tokenizer, work, Corpus.open(corpus).train
        self.asked: list[tuple[str, bool, str]] = []
        self.block = threading.Event()
        self.block.set()

    def __call__(self, shard: Shard, is_awaited: bool, check: Callable[[], None]) -> Path:
        self.asked.append((shard.stem, is_awaited, threading.current_thread().name))
        while not self.block.wait(0.001):
            check()
        folder = self.work / shard.stem
        if not folder.exists():
            folder.mkdir()
            encode_shard(shard, self.tokenizer, folder, threads=1, check=check)
        return folder


@pytest.fixture
def maker(hundred: Path, tokenizer: Tokenizer, tmp_path: Path) -> Maker:
    return Maker(hundred, tokenizer, tmp_path)


def test_only_the_current_and_the_next_shard_are_encoded(maker):
    cursor = Documents(maker.shards, maker)
    assert maker.asked == [], "nothing is encoded before the first document is read"
    cursor.next(1)
    cursor.close()
    assert maker.asked == [("shard_00000", True, "MainThread"), ("shard_00001", False, "encode shard_00001.parquet")]


def test_reader_waits_for_the_background_encoding(maker):
    shards = Documents(maker.shards, maker)
    maker.block.clear()
    shards.prepare(1)
    threading.Timer(0.05, maker.block.set).start()
    assert len(shards.tokens(1)) == 40
    assert [asked[:2] for asked in maker.asked] == [("shard_00001", False), ("shard_00001", True)]
    assert sorted(path.name for path in maker.work.iterdir()) == ["shard_00001"]


def test_closing_ends_the_background_encoding(maker):
    shards, before = Documents(maker.shards, maker), threading.active_count()
    maker.block.clear()
    shards.prepare(1)
    assert threading.active_count() == before + 1
    shards.close()
    assert threading.active_count() == before
    assert list(maker.work.iterdir()) == []


def test_failed_background_encoding_is_raised_to_the_reader(maker):
    def obtain(shard: Shard, is_awaited: bool, check: Callable[[], None]) -> Path:
        if shard.stem == "shard_00001":
            raise OSError("disk is full")
        return maker(shard, is_awaited, check)

    cursor = Documents(maker.shards, obtain)
    cursor.next(40)
    with pytest.raises(OSError, match="disk is full"):
        cursor.next(1)


def test_number_of_open_shards_is_limited(maker, monkeypatch):
    monkeypatch.setattr(documents_module, "_MOST_OPEN_SHARDS", 2)
    shards = Documents(maker.shards, maker)
    cursor = shards
    addresses = [address for address, _ in cursor.next(90)]
    for address in (addresses[0], addresses[50], addresses[89]):
        assert cursor.length(address) == len(cursor.ids(address))
        assert len(shards._open) <= 2
    cursor.close()
