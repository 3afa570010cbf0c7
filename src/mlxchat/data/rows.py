"""Rows of parquet files by number, in a seeded order, without a Python object for any that is not asked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlxchat.errors import DataError
from mlxchat.hub.cache import cache_folder

_LARGEST_IN_MEMORY = 256 << 20
"""Bytes of uncompressed columns above which they are kept in a file that is mapped, not in memory."""


class Rows:
    """Rows of files one after the other, permuted as `datasets.Dataset.shuffle(seed)` permutes them."""

    def __init__(
        self, files: Sequence[Path], columns: Sequence[str], *, seed: int | None = None, nested: str | None = None
    ) -> None:
        """Read some columns of the files.

        Args:
            files: parquet, in their order.
            columns: what a row holds.
            seed: of the permutation; None: the files' own order.
            nested: a column that holds the others, where they are not there themselves.

        Raises:
            DataError: a file cannot be read or lacks a column.
        """
        self._table = _read(files, columns, nested)
        count = self._table.num_rows
        self._order = None if seed is None else np.random.default_rng(seed).permutation(count)
        self._columns = [(name, self._table.column(name)) for name in columns]

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._table.num_rows)

    def number(self, index: int) -> int:
        """Return which row of the files is at an index."""
        return index if self._order is None else int(self._order[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row: column → value.

        Raises:
            IndexError: there is none.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} rows, none is number {index}")
        number = self.number(index)
        return {name: column[number].as_py() for name, column in self._columns}


def _read(files: Sequence[Path], columns: Sequence[str], nested: str | None) -> pa.Table:
    try:
        parquets = [pq.ParquetFile(path) for path in files]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{', '.join(map(str, files))}: cannot be read as parquet ({error})") from None
    wanted = []
    for path, parquet in zip(files, parquets, strict=True):
        names = parquet.schema_arrow.names
        inside = nested if nested in names and not set(columns) <= set(names) else None
        missing = [] if inside else [column for column in columns if column not in names]
        if missing:
            raise DataError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(names)}")
        wanted.append(inside)

    def batches(parquet: pq.ParquetFile, inside: str | None) -> Any:
        # By groups: iter_batches reads ahead, and keeps hundreds of megabytes of a large file.
        for group in range(parquet.metadata.num_row_groups):
            table = parquet.read_row_group(group, columns=[inside] if inside else list(columns))
            if inside:
                table = table.flatten()
                table = table.rename_columns([name.removeprefix(f"{inside}.") for name in table.column_names])
            yield from table.select(list(columns)).to_batches()

    size = sum(
        parquet.metadata.row_group(group).total_byte_size
        for parquet in parquets
        for group in range(parquet.metadata.num_row_groups)
    )
    stream = (batch for parquet, inside in zip(parquets, wanted, strict=True) for batch in batches(parquet, inside))
    try:
        first = next(stream, None)
        if first is None:
            return pa.table({column: [] for column in columns})
        if size <= _LARGEST_IN_MEMORY:
            return pa.Table.from_batches([first, *(batch.cast(first.schema) for batch in stream)])
        return _map(first, stream)
    except (KeyError, pa.ArrowException) as error:
        raise DataError(f"{', '.join(map(str, files))}: cannot be read ({error})") from None


def _map(first: pa.RecordBatch, rest: Any) -> pa.Table:
    """Return a table whose memory is a file without a name: the system keeps of it what it has room for."""
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".arrow", dir=folder if os.access(folder, os.W_OK) else None)
    os.close(handle)
    path = Path(name)
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            writer.write_batch(first)
            for batch in rest:
                writer.write_batch(batch.cast(first.schema))
        return pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()
    finally:
        path.unlink()  # the mapping keeps the content until nobody reads it any more
