"""Text shards: parquet files with one column `text`, as nanochat's. A corpus artifact is a folder of them.

shard_00000.parquet … are for training, validation.parquet is held out; corpus.json counts documents and characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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


class DocumentCursor:
    """Documents of a split in order, forever, with a position that can be saved and returned to.

    A document's address is (shard, row group, row): with it `fetch` reads the document again.
    """

    def __init__(self, corpus: Path, split: str) -> None:
        """Start at the first document."""
        self._files = [pq.ParquetFile(path) for path in shard_paths(corpus, split)]
        if not any(file.metadata.num_rows for file in self._files):
            raise DataError(f"{corpus}: the {split} shards hold no document")
        self._cached: tuple[tuple[int, int], list[str]] | None = None
        self.epoch = 0
        self._position = (0, 0, 0)

    def next(self, count: int) -> list[tuple[tuple[int, int, int], str]]:
        """Return the next `count` documents with their addresses."""
        found: list[tuple[tuple[int, int, int], str]] = []
        while len(found) < count:
            shard, group, row = self._position
            if shard == len(self._files):
                self.epoch, self._position = self.epoch + 1, (0, 0, 0)
            elif group == self._files[shard].num_row_groups:
                self._position = (shard + 1, 0, 0)
            elif row == len(self._read(shard, group)):
                self._position = (shard, group + 1, 0)
            else:
                found.append((self._position, self._read(shard, group)[row]))
                self._position = (shard, group, row + 1)
        return found

    def fetch(self, address: Iterable[int]) -> str:
        """Return the document at an address."""
        shard, group, row = address
        return self._read(shard, group)[row]

    def state(self) -> dict[str, Any]:
        """Return the position as plain numbers."""
        return {"epoch": self.epoch, "position": list(self._position)}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self.epoch = state["epoch"]
        shard, group, row = state["position"]
        self._position = (shard, group, row)

    def _read(self, shard: int, group: int) -> list[str]:
        if self._cached is None or self._cached[0] != (shard, group):
            column = self._files[shard].read_row_group(group, columns=["text"]).column("text")
            self._cached = ((shard, group), column.to_pylist())
        return self._cached[1]


def _write_shard(path: Path, documents: list[str], row_group_documents: int) -> None:
    """Write documents in nanochat's format: zstd, no dictionary, small row groups for positions to resume at."""
    table = pa.table({"text": documents})
    pq.write_table(
        table, path, row_group_size=row_group_documents, compression="zstd", compression_level=3,
        use_dictionary=False, write_statistics=False,
    )  # fmt: skip
