"""Tasks with downloaded data: from a data set of the Hugging Face Hub, or from an address.

Nothing is downloaded before the first conversation is needed. Rows of the Hub stay in memory-mapped Arrow tables.
"""

from __future__ import annotations

import random
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlxchat.config.pins import UNKNOWN
from mlxchat.errors import ConfigError, DataError
from mlxchat.hub import client, listings
from mlxchat.hub.cache import HubFile, cache_folder
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import Task

if TYPE_CHECKING:
    import pyarrow as pa

NANOCHAT_SEED = 42  # nanochat shuffles every data set with it


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
    def files(self) -> list[HubFile]:
        """The matching files; raises DataError if none match."""
        files = listings.list_files(self.repository, revision=self.revision, pattern=self.pattern)
        if not files:
            raise DataError(f"{self.repository} at {self.revision} has no file {self.pattern}")
        return files

    def fetch(self, check: Callable[[], None] = lambda: None) -> list[Path]:
        """Download missing files, and return the paths of all."""
        return client.fetch_files(self.files, check=check)

    def content(self) -> str:
        """Return the repository, pattern and commit, for the step's key."""
        commit = listings.find_commit(self.repository, self.revision)
        if commit is None:
            return f"{UNKNOWN}{self.repository} at {self.revision}"
        return f"{self.repository}/{self.pattern} at {commit}"

    def records(self) -> list[dict[str, Any]]:
        """Return a record of each file: url, revision, sha256, bytes."""
        return [{"name": f"{file.repository}/{file.path}", **client.record(file)} for file in self.files]


@dataclass(eq=False, kw_only=True)
class UrlTask(Task):
    """A task that reads one file: `path`, or the address in the first of `source_options`."""

    sha256: str | None = None
    """Required hash of the file at the address; None: any contents."""
    path: str | Path | None = None
    """A local file instead of the address."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for source in self.needs():
            if not source.url.startswith(("http://", "https://")):
                raise ConfigError(
                    f'{self.source_options[0]} of task {self.name} is "{source.url}", expected an address (http://, '
                    "https://). For a local file, set the task's option path=FILE."
                )

    def needs(self) -> list[UrlSource]:
        """Return the address as a source, unless the task reads a local file."""
        return [] if self.path is not None else [UrlSource(getattr(self, self.source_options[0]), self.sha256)]

    def _file(self) -> Path:
        """Return the path of the file, downloaded if necessary."""
        return Path(self.path) if self.path is not None else self.fetch()[0]


@dataclass(eq=False, kw_only=True)
class HubTask(Task):
    """A task whose rows are in parquet files of the Hub, in the order of nanochat's shuffle."""

    home: ClassVar[str]
    """The default repository, which nanochat reads."""
    subsets: ClassVar[tuple[str, ...]]
    """Readable configurations of the data set; the first is the default."""
    columns: ClassVar[tuple[str, ...]]
    source_options: ClassVar[tuple[str, ...]] = ("repository", "revision", "subset")
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
        super().__post_init__()
        if self.subset is None:
            self.subset = self.subsets[0]
        self._check_choice("subset", self.subset, self.subsets)
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
        return Rows(self.fetch(), self.columns, seed=self.seed)

    @abstractmethod
    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        """Return the conversation of a row (column → value)."""

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        return self._conversation_of(self.rows[index])

    def _own_size(self) -> int:
        return len(self.rows)


class Rows:
    """The rows of parquet files, permuted as by `datasets.Dataset.shuffle(seed)`; memory-mapped: they may be GB."""

    def __init__(self, files: Sequence[Path], columns: Sequence[str], *, seed: int) -> None:
        import numpy as np

        self._table = _read_parquet(files, list(columns))
        self.order = np.random.default_rng(seed).permutation(self._table.num_rows).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.order[index]
        return {name: self._table.column(name)[number].as_py() for name in self._table.column_names}


def _read_parquet(files: Sequence[Path], columns: list[str]) -> pa.Table:
    """Return columns of files as one table, memory-mapped from an unlinked temporary file."""
    import pyarrow as pa  # not at module level: planning imports tasks but reads no rows
    import pyarrow.parquet as pq

    cache_folder().mkdir(parents=True, exist_ok=True)
    writer: Any = None
    with tempfile.NamedTemporaryFile(suffix=".arrow", dir=cache_folder()) as target:
        for path in files:
            try:
                source = pq.ParquetFile(path)
                # By row groups, since iter_batches reads ahead hundreds of megabytes.
                for table in map(source.read_row_group, range(source.num_row_groups)):
                    if table.num_columns == 1 and pa.types.is_struct(table.schema.types[0]):
                        table = pa.Table.from_struct_array(table.column(0))  # as in MMLU's auxiliary_train
                    table = table.select(columns)
                    if writer is None:
                        schema = table.schema
                        writer = pa.ipc.new_file(target.name, schema)
                    writer.write_table(table.cast(schema))
            except (OSError, KeyError, pa.ArrowException) as error:
                has = f"the columns {', '.join(columns)}"
                raise DataError(f"{path}: cannot be read as parquet with {has} ({error})") from None
        writer.close()
        return pa.ipc.open_file(pa.memory_map(target.name)).read_all()
