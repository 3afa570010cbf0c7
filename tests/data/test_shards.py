"""Shards: every document once, nanochat's format, few documents in memory."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit.text import DOCUMENTS
from mlxchat.data.sources import Corpus, Shard, write_shards
from mlxchat.errors import DataError


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


def test_shards_are_reproducible(hundred, make_corpus):
    again = make_corpus(DOCUMENTS, validation=10, shard=40, row_group=7)
    for path in hundred.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_corpora_without_training_documents_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"corpus has 3 documents, of which corpus\.validation_documents=3"):
        write_shards(tmp_path, DOCUMENTS[:3], validation_documents=3, shard_documents=10, row_group_documents=5)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"has no shard_\*\.parquet and no validation\.parquet"):
        Corpus.open(tmp_path)


def test_few_long_documents_are_in_memory(tmp_path):
    """A kilobyte of parquet can contain 1,024 equal documents of many megabytes."""
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table({"text": ["x" * (2 << 20)] * 64}), path, compression="zstd")
    assert path.stat().st_size < 2000
    before = pa.total_allocated_bytes()
    documents = Shard.of(path).documents()
    assert len(next(documents)) == 2 << 20
    assert pa.total_allocated_bytes() - before < 40 << 20, "all 64 take 128 MB"
