"""Tasks with downloaded data: from a data set of the Hugging Face Hub, or from an address.

Nothing is downloaded before the first conversation is needed. Rows of the Hub stay in Arrow tables.
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
    """A file at an address."""

    url: str
    sha256: str | None = None

    def fetch(self, check: Callable[[], None] = lambda: None) -> list[Path]:
        """Download the file if it is missing, and return its path."""
        return [client.fetch_url(self.url, sha256=self.sha256, check=check)]

    def content(self) -> str:
        """Return the file's sha256, for the step's key."""
        return client.find_content(self.url, self.sha256) or f"{UNKNOWN}{self.url}"

    def records(self) -> list[dict[str, Any]]:
        """Return a record of the file: url, sha256, bytes."""
        return [{"name": self.url.rpartition("/")[2], **client.record(path)} for path in self.fetch()]


@dataclass(frozen=True)
class HubSource:
    """The files of a Hub repository that match a pattern."""

    repository: str
    revision: str
    pattern: str

    @cached_property
    def files(self) -> list[client.HubFile]:
        """The matching files.

        Raises:
            DataError: none match.
        """
        files = client.list_files(self.repository, revision=self.revision, pattern=self.pattern)
        if not files:
            raise DataError(f"{self.repository} at {self.revision} has no file {self.pattern}")
        return files

    def fetch(self, check: Callable[[], None] = lambda: None) -> list[Path]:
        """Download missing files, and return the paths of all."""
        return client.fetch_files(self.files, check=check)

    def content(self) -> str:
        """Return the repository, pattern and commit, for the step's key."""
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
    """A task that reads one file: `path`, or the address in the first of `source_options`."""

    is_lazy = True
    bundled: ClassVar[str | None] = None
    """Value of the address option that selects data shipped with mlxchat; None: there are none."""
    sha256: str | None = None
    """Required hash of the file at the address; None: any contents."""
    path: str | Path | None = None
    """A local file instead of the address."""

    def __post_init__(self) -> None:
        """Check the address."""
        super().__post_init__()
        option, also = self.source_options[0], f" or {self.bundled}" if self.bundled else ""
        for source in self.needs():
            if not source.url.startswith(("http://", "https://")):
                raise ConfigError(
                    f'{option} of task {self.name} is "{source.url}", expected an address (http://, https://){also}. '
                    "For a local file, set the task's option path=FILE."
                )

    def needs(self) -> list[UrlSource]:
        """Return the address as a source, unless the task reads local or bundled data."""
        address = getattr(self, self.source_options[0])
        return [] if self.path is not None or address == self.bundled else [UrlSource(address, self.sha256)]

    def _file(self) -> Path | None:
        """Return the path of the file, downloaded if necessary; None: bundled data."""
        return Path(self.path) if self.path is not None else next(iter(self.fetch()), None)


@dataclass(eq=False, kw_only=True)
class HubTask(Task):
    """A task whose rows are in parquet files of the Hub, in the order of nanochat's shuffle."""

    home: ClassVar[str]
    """The default repository, which nanochat reads."""
    subsets: ClassVar[tuple[str, ...]]
    """Readable configurations of the data set; the first is the default."""
    columns: ClassVar[tuple[str, ...]]
    texts: ClassVar[tuple[str, ...]] = ()
    """Columns that must contain strings."""
    may_be_null: ClassVar[tuple[str, ...]] = ()
    """Columns that may be null."""
    nested: ClassVar[str | None] = None
    """A struct column that may contain all the others."""
    source_options: ClassVar[tuple[str, ...]] = ("repository", "revision", "subset")
    is_lazy = True
    repeats = False
    seed: int = NANOCHAT_SEED
    """Seed of the shuffle."""
    repository: str | None = None
    """A copy to read instead of `home`, with the same columns and file names."""
    revision: str = "main"
    """Commit, tag or branch."""
    subset: str | None = None
    """One of `subsets`; None: the first."""

    def __post_init__(self) -> None:
        """Check the subset."""
        super().__post_init__()
        if self.subset is None:
            self.subset = self.subsets[0]
        if self.subset not in self.subsets:
            expected, hint = " or ".join(self.subsets), suggest(self.subset, self.subsets)
            raise ConfigError(f'subset of task {self.name} is "{self.subset}", expected {expected}.{hint}')
        self._source = HubSource(self.repository or self.home, self.revision, self.pattern())

    def pattern(self) -> str:
        """Return the shell pattern of the split's files; raises ConfigError if the subset has no such split."""
        return f"{self.subset}/{self.split}-*.parquet"

    def needs(self) -> list[HubSource]:
        """Return the repository's files as a source."""
        return [self._source]

    @cached_property
    def rows(self) -> Rows:
        """All rows in the shuffled order, before `start`, `stop` and `step`."""
        return Rows(self.fetch(), self.columns, seed=self.seed, nested=self.nested)

    def row(self, index: int) -> dict[str, Any]:
        """Return the row of a conversation: column → value.

        Raises:
            DataError: a required cell is null, or a column of `texts` is not text.
        """
        try:
            row = self.rows[index]
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(index)} is not in UTF-8 ({error})") from None
        empty = [name for name, value in row.items() if name not in self.may_be_null and _holds_null(value)]
        if empty:
            raise DataError(f"{self.place(index)} is null in {', '.join(empty)}")
        if wrong := [name for name in self.texts if not isinstance(row[name], str)]:
            raise DataError(f"{self.place(index)} is not text in {', '.join(wrong)}")
        return row

    def __getitem__(self, index: int) -> Conversation:
        """Return a conversation.

        Raises:
            DataError: its row has an unexpected format.
        """
        try:
            return super().__getitem__(index)
        except (TypeError, KeyError, AttributeError) as error:
            place = self.place(self._indices()[index])
            raise DataError(f"{place} has an unexpected format ({error})") from None

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
    """The concatenated rows of files, permuted as by `datasets.Dataset.shuffle(seed)`.

    They are memory-mapped, so that data sets of gigabytes need no memory.
    """

    def __init__(
        self, files: Sequence[Path], columns: Sequence[str], *, seed: int | None = None, nested: str | None = None
    ) -> None:
        """Read columns of parquet files, from inside the struct column `nested` if they are not at the top level.

        Without a seed the rows keep their order.

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
        """Return the position in the files of the row at an index."""
        return index if self._order is None else int(self._order[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row: column → value.

        Raises:
            IndexError: `index` is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is out of range, there are {len(self)} rows")
        number = self.number(index)
        return {name: column[number].as_py() for name, column in self._columns}


def _read_parquet(files: Sequence[Path], columns: Sequence[str], nested: str | None) -> pa.Table:
    """Return columns of files as one table, memory-mapped from an unlinked temporary file."""
    import pyarrow as pa  # not at module level: planning imports tasks but reads no rows

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
    # By row groups, since iter_batches reads ahead hundreds of megabytes.
    for group in range(file.metadata.num_row_groups):
        table = file.read_row_group(group, columns=[inside] if inside else list(columns))
        if inside:
            table = table.flatten()
            table = table.rename_columns([name.removeprefix(f"{inside}.") for name in table.column_names])
        yield from table.select(list(columns)).to_batches()
