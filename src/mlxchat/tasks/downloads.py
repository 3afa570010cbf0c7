"""Tasks whose data are downloaded: from a data set of the Hugging Face Hub, or from a plain address.

Nothing is fetched before the first conversation is needed. Rows of the Hub stay in Arrow tables.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlxchat.errors import ConfigError, DataError, suggest
from mlxchat.hub import client, listings
from mlxchat.hub.cache import cache_folder
from mlxchat.runner.keys import UNKNOWN
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import Task

if TYPE_CHECKING:
    import pyarrow as pa

NANOCHAT_SEED = 42
"""nanochat shuffles every data set with this seed."""


@dataclass(frozen=True)
class UrlSource:
    """An address that a task reads."""

    url: str
    sha256: str | None = None

    def fetch(self, check: Callable[[], None] = lambda: None) -> list[Path]:
        """Return the file at the address, downloaded if it is not there."""
        return [client.fetch_url(self.url, sha256=self.sha256, check=check)]

    def content(self) -> str:
        """Return the file's sha256, for a key."""
        return client.find_content(self.url, self.sha256) or f"{UNKNOWN}{self.url}"

    def records(self) -> list[dict[str, Any]]:
        """Return a record of the file: url, sha256, bytes."""
        return [{"name": self.url.rpartition("/")[2], **client.record(path)} for path in self.fetch()]


@dataclass(frozen=True)
class HubSource:
    """Files of a repository that a task reads."""

    repository: str
    revision: str
    pattern: str

    @cached_property
    def files(self) -> list[client.HubFile]:
        """The files that match.

        Raises:
            DataError: there are none.
        """
        files = client.list_files(self.repository, revision=self.revision, pattern=self.pattern)
        if not files:
            raise DataError(f"{self.repository} at {self.revision} has no file {self.pattern}")
        return files

    def fetch(self, check: Callable[[], None] = lambda: None) -> list[Path]:
        """Return the files, downloaded if they are not there."""
        return client.fetch_files(self.files, check=check)

    def content(self) -> str:
        """Return which files of which commit are read, for a key."""
        commit = listings.find_commit(self.repository, self.revision)
        return (
            f"{self.repository}/{self.pattern} at {commit}"
            if commit
            else f"{UNKNOWN}{self.repository} at {self.revision}"
        )

    def records(self) -> list[dict[str, Any]]:
        """Return a record of each file: url, revision, sha256, bytes."""
        return [{"name": f"{file.repository}/{file.path}", **client.record(file)} for file in self.files]


@dataclass(eq=False, kw_only=True)
class UrlTask(Task):
    """A task that reads one file: the user's own (`path`), or one at the address in the first of `source_options`."""

    is_lazy = True
    bundled: ClassVar[str | None] = None
    """What stands in place of an address for data that come with mlxchat; None: there are none."""
    sha256: str | None = None
    """Of what is at the address; None: any contents."""
    path: str | Path | None = None
    """A file in place of the address."""

    def __post_init__(self) -> None:
        """Check the address; nothing is read yet."""
        super().__post_init__()
        option, also = self.source_options[0], f" or {self.bundled}" if self.bundled else ""
        for source in self.needs():
            if not source.url.startswith(("http://", "https://")):
                raise ConfigError(
                    f'{option} of task {self.name} is "{source.url}", expected an address (http://, https://){also}. '
                    "A file of your own is given as path=FILE; its contents then become part of the artifact's id."
                )

    def needs(self) -> list[UrlSource]:
        """Return the address, if the task reads from one."""
        address = getattr(self, self.source_options[0])
        return [] if self.path is not None or address == self.bundled else [UrlSource(address, self.sha256)]

    def _file(self) -> Path | None:
        """Return the file, downloaded if need be; None: the task reads none."""
        return Path(self.path) if self.path is not None else next(iter(self.fetch()), None)


@dataclass(eq=False, kw_only=True)
class HubTask(Task):
    """A task whose rows are parquet files of the Hub, shuffled as nanochat shuffles them; read when needed."""

    home: ClassVar[str]
    """The data set that nanochat reads."""
    subsets: ClassVar[tuple[str, ...]]
    """Configurations of the data set that can be read; the first is the default."""
    columns: ClassVar[tuple[str, ...]]
    texts: ClassVar[tuple[str, ...]] = ()
    """Columns of plain text."""
    may_be_null: ClassVar[tuple[str, ...]] = ()
    """Columns that may be empty, since no question depends on them."""
    nested: ClassVar[str | None] = None
    """A column that may hold all the others."""
    source_options: ClassVar[tuple[str, ...]] = ("repository", "revision", "subset")
    is_lazy = True
    repeats = False
    seed: int = NANOCHAT_SEED
    """Of the shuffle."""
    repository: str | None = None
    """Another one than `home`, with the same columns and file names, such as a copy."""
    revision: str = "main"
    """Commit, tag or branch."""
    subset: str | None = None
    """One of `subsets`; None: the first."""

    def __post_init__(self) -> None:
        """Check the subset; nothing is read yet."""
        super().__post_init__()
        if self.subset is None:
            self.subset = self.subsets[0]
        if self.subset not in self.subsets:
            expected, hint = " or ".join(self.subsets), suggest(self.subset, self.subsets)
            raise ConfigError(f'subset of task {self.name} is "{self.subset}", expected {expected}.{hint}')
        self._source = HubSource(self.repository or self.home, self.revision, self.pattern())

    def pattern(self) -> str:
        """Return the shell pattern of the files of the split; raises ConfigError if the subset has no such split."""
        return f"{self.subset}/{self.split}-*.parquet"

    def needs(self) -> list[HubSource]:
        """Return what is read from the Hub."""
        return [self._source]

    @cached_property
    def rows(self) -> Rows:
        """The rows in the order of the conversations, before `start`, `stop` and `step`."""
        return Rows(self.fetch(), self.columns, seed=self.seed, nested=self.nested)

    def row(self, index: int) -> dict[str, Any]:
        """Return the row of a conversation by column.

        Raises:
            DataError: a required cell is empty, or a column of text holds something else.
        """
        try:
            row = self.rows[index]
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(index)} is not in UTF-8 ({error})") from None
        empty = [name for name, value in row.items() if name not in self.may_be_null and _holds_null(value)]
        if empty:
            raise DataError(f"{self.place(index)} has nothing (null) in {', '.join(empty)}")
        if strange := [name for name in self.texts if not isinstance(row[name], str)]:
            raise DataError(f"{self.place(index)} has no text in {', '.join(strange)}")
        return row

    def __getitem__(self, index: int) -> Conversation:
        """Return a conversation.

        Raises:
            DataError: its row is not of the form that the task expects.
        """
        try:
            return super().__getitem__(index)
        except (TypeError, KeyError, AttributeError) as error:
            place = self.place(self._indices()[index])
            raise DataError(f"{place} holds something else than this task expects ({error})") from None

    def place(self, index: int) -> str:
        """Return the name of a row for messages."""
        return f"task {self.name}: row {self.rows.number(index)} of {self._source.repository}/{self._source.pattern}"

    def _own_size(self) -> int:
        return len(self.rows)


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return any(map(_holds_null, value)) if isinstance(value, list) else value is None


class Rows:
    """Rows of files one after the other, permuted as `datasets.Dataset.shuffle(seed)` permutes them.

    They are memory-mapped: a data set of gigabytes takes no memory of its own.
    """

    def __init__(
        self, files: Sequence[Path], columns: Sequence[str], *, seed: int | None = None, nested: str | None = None
    ) -> None:
        """Read some columns of parquet files, or those inside the column `nested` where they are not there themselves.

        Without a seed the rows keep the order of the files.

        Raises:
            DataError: a file cannot be read or lacks a column.
        """
        self._table = _read_parquet(files, columns, nested)
        self._order = None
        if seed is not None:
            import numpy as np

            self._order = np.random.default_rng(seed).permutation(self._table.num_rows)
        self._columns = [(name, self._table.column(name)) for name in columns]

    def __len__(self) -> int:
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


def _read_parquet(files: Sequence[Path], columns: Sequence[str], nested: str | None) -> pa.Table:
    """Return some columns of files as one memory-mapped table, whose own file is unlinked."""
    import pyarrow as pa  # planning imports tasks, and reads no rows

    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        folder = Path(tempfile.gettempdir())
    with tempfile.NamedTemporaryFile(suffix=".arrow", dir=folder) as file:
        writer, schema = None, None
        for path in files:
            try:
                for batch in _batches(path, columns, nested):
                    if writer is None:
                        schema = batch.schema
                        writer = pa.ipc.new_file(file.name, schema)
                    writer.write_batch(batch.cast(schema))
            except (OSError, KeyError, pa.ArrowException) as error:
                raise DataError(f"{path}: cannot be read as parquet ({error})") from None
        if writer is None:
            return pa.table({column: [] for column in columns})
        writer.close()
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()


def _batches(path: Path, columns: Sequence[str], nested: str | None) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    inside = nested if nested in names and not set(columns) <= set(names) else None
    missing = [] if inside else [column for column in columns if column not in names]
    if missing:
        raise DataError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(names)}")
    # By groups: iter_batches reads ahead, and keeps hundreds of megabytes of a large file.
    for group in range(file.metadata.num_row_groups):
        table = file.read_row_group(group, columns=[inside] if inside else list(columns))
        if inside:
            table = table.flatten()
            table = table.rename_columns([name.removeprefix(f"{inside}.") for name in table.column_names])
        yield from table.select(list(columns)).to_batches()
