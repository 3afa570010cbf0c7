"""What tasks over a data set of the Hugging Face Hub share: the files they read, and rows in nanochat's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlxchat.errors import ConfigError, DataError, suggest
from mlxchat.tasks.base import Conversation, Task, dialogue, render_mc

if TYPE_CHECKING:
    from mlxchat.data.rows import Rows
    from mlxchat.hub.client import HubFile

NANOCHAT_SEED = 42
"""With which nanochat shuffles every data set."""


@dataclass(frozen=True)
class HubSource:
    """Files of a repository that a task reads."""

    repository: str
    revision: str
    pattern: str


class HubTask(Task):
    """A task whose rows are parquet files of the Hub, fetched when the first of them is asked for.

    Rows are shuffled as nanochat shuffles them, with seed 42 unless another is given.
    """

    repository: ClassVar[str]
    subsets: ClassVar[tuple[str, ...]]
    """Configurations of the data set that can be read; the first is meant where none is named."""
    columns: ClassVar[tuple[str, ...]]
    texts: ClassVar[tuple[str, ...]] = ()
    """Columns of plain text."""
    may_be_null: ClassVar[tuple[str, ...]] = ()
    """Columns that may be empty: nothing that is asked depends on them."""
    nested: ClassVar[str | None] = None
    """A column that may hold all the others."""
    source_options: ClassVar[tuple[str, ...]] = ("repository", "revision", "subset")
    is_lazy = True

    def __init__(
        self,
        split: str,
        *,
        size: int | None = None,
        seed: int = NANOCHAT_SEED,
        repository: str | None = None,
        revision: str = "main",
        subset: str | None = None,
    ) -> None:
        """Choose rows; nothing is read yet.

        Args:
            split: one of the class's `splits`.
            size: at most so many; None: all.
            seed: of the shuffle.
            repository: another one with the same columns and file names, such as a copy.
            revision: commit, tag or branch.
            subset: one of the class's `subsets`.

        Raises:
            ConfigError: split, size or subset cannot be.

        """
        super().__init__(split, size=size, seed=seed)
        self.subset = self.subsets[0] if subset is None else subset
        if self.subset not in self.subsets:
            hint = suggest(self.subset, self.subsets)
            raise ConfigError(
                f'subset of task {self.name} is "{self.subset}", expected {" or ".join(self.subsets)}.{hint}'
            )
        self._repository = repository or self.repository
        self._revision = revision
        self.check()

    def check(self) -> None:
        """Raise ConfigError where split and subset do not go together."""

    def pattern(self) -> str:
        """Return the shell pattern of the files of the split."""
        return f"{self.subset}/{self.split}-*.parquet"

    def needs(self) -> list[HubSource]:
        """Return what is read from the Hub."""
        return [HubSource(self._repository, self._revision, self.pattern())]

    def fetch(self, check: Callable[[], None] = lambda: None) -> list[Path]:
        """Return the files, downloaded if they are not there."""
        from mlxchat.hub.client import fetch_files

        return fetch_files(self._files, check=check)

    def sources(self) -> list[dict[str, Any]]:
        """Return a record of each file that is read: url, revision, sha256, bytes."""
        from mlxchat.hub.client import record

        return [{"name": f"{file.repository}/{file.path}", **record(file)} for file in self._files]

    @cached_property
    def _files(self) -> list[HubFile]:
        from mlxchat.hub.client import list_files

        (source,) = self.needs()
        files = list_files(source.repository, revision=source.revision, pattern=source.pattern)
        if not files:
            raise DataError(
                f"task {self.name}: {source.repository} at {source.revision} has no file {source.pattern} for the "
                f"split {self.split}"
            )
        return files

    @cached_property
    def rows(self) -> Rows:
        """The rows in the order of the conversations, before `start`, `stop` and `step`."""
        from mlxchat.data.rows import Rows

        return Rows(self.fetch(), self.columns, seed=self.seed, nested=self.nested)

    def row(self, index: int) -> dict[str, Any]:
        """Return the row of a conversation by column.

        Raises:
            DataError: a cell that counts is empty, or is no text though it says so.
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
        """Return what people call a row."""
        return f"task {self.name}: row {self.rows.number(index)} of {self._repository}/{self.pattern()}"

    def _own_size(self) -> int:
        return len(self.rows)

    def _most(self) -> int | None:
        return len(self.rows)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Say whether the response is the right letter and nothing else."""
        return response.strip() == str(conversation["answer"])


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return any(map(_holds_null, value)) if isinstance(value, list) else value is None


def choice_dialogue(
    question: str, letters: Sequence[str], choices: Sequence[str], answer: str, **extra: Any
) -> Conversation:
    """Return a multiple-choice conversation with its letters and its answer."""
    user = render_mc(question, letters, choices)
    return dialogue(user, answer, **extra, letters=list(letters), answer=answer)
