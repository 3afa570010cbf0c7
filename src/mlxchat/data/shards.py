"""Text shards: parquet files with one column `text`, as nanochat's. A corpus artifact is a folder of them.

shard_00000.parquet … are for training, validation.parquet is held out; corpus.json counts documents and characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mlxchat.errors import DataError

VALIDATION = "validation.parquet"


def write_shards(
    folder: Path,
    documents: list[str],
    *,
    validation_documents: int,
    shard_documents: int,
    row_group_documents: int,
) -> None:
    """Write documents as shards: the first `validation_documents` are held out, the rest is for training.

    Raises:
        DataError: nothing would be left to train on.
    """
    if len(documents) <= validation_documents:
        raise DataError(
            f"the corpus has {len(documents)} documents, of which corpus.validation_documents={validation_documents} "
            "are held out: nothing is left to train on. Lower it, or give more text."
        )
    _write_shard(folder / VALIDATION, documents[:validation_documents], row_group_documents)
    for index, start in enumerate(range(validation_documents, len(documents), shard_documents)):
        part = documents[start : start + shard_documents]
        _write_shard(folder / f"shard_{index:05d}.parquet", part, row_group_documents)


def shard_paths(corpus: Path, split: str) -> list[Path]:
    """Return a corpus's files of 'train' (in order) or 'validation'.

    Raises:
        DataError: there are none.
    """
    pattern = VALIDATION if split == "validation" else "shard_*.parquet"
    paths = sorted(corpus.glob(pattern))
    if not paths:
        raise DataError(f"{corpus} holds no {pattern}")
    return paths


def iterate_documents(corpus: Path, split: str) -> Iterator[str]:
    """Yield every document of a split once, in order."""
    for path in shard_paths(corpus, split):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=["text"]).column("text").to_pylist()


def _write_shard(path: Path, documents: list[str], row_group_documents: int) -> None:
    """Write documents in nanochat's format: zstd, no dictionary, small row groups for positions to resume at."""
    table = pa.table({"text": documents})
    pq.write_table(
        table, path, row_group_size=row_group_documents, compression="zstd", compression_level=3,
        use_dictionary=False, write_statistics=False,
    )  # fmt: skip
