"""A mixture: conversations of several tasks in one deterministic order."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import overload

from mlxchat.config import TaskItem
from mlxchat.data.conversation import Conversation
from mlxchat.errors import ConfigError
from mlxchat.tasks import Task, load_task


def load_item(item: TaskItem) -> Task:
    """Return the task that a line of a mixture or suite names.

    Raises:
        ConfigError: its name, split or options are wrong.
        DataError: its data cannot be read.
    """
    options = {"size": item.size, "path": item.path, "fields": item.fields, **item.options}
    return load_task(item.task, item.split, **{key: value for key, value in options.items() if value is not None})


class Mixture(Sequence[Conversation]):
    """All conversations of the tasks, each as often as its task has epochs, shuffled."""

    def __init__(self, items: Mapping[str, TaskItem], *, seed: int) -> None:
        """Load the tasks.

        Raises:
            ConfigError: the mixture is empty.
        """
        # By name: the order in which a file lists its tasks is no part of its identity.
        ordered = dict(sorted(items.items()))
        self._tasks = {name: load_item(item) for name, item in ordered.items()}
        self._order = [
            (name, index)
            for name, item in ordered.items()
            for _ in range(item.epochs)
            for index in range(len(self._tasks[name]))
        ]
        if not self._order:
            raise ConfigError("the mixture holds no conversation")
        random.Random(seed).shuffle(self._order)

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        """Return a conversation, or several."""
        if isinstance(index, slice):
            return [self._tasks[name][place] for name, place in self._order[index]]
        name, place = self._order[index]
        return self._tasks[name][place]

    def name(self, index: int) -> str:
        """Return what people call a conversation: its task's entry and its number there, from 0."""
        task, place = self._order[index]
        return f"{task} conversation {place}"
