"""Mixtures: conversations of several tasks in one deterministic order, shuffled or task by task."""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from mlxchat.config.schema import TaskItem
from mlxchat.errors import ConfigError
from mlxchat.runner.context import Context
from mlxchat.tasks import Conversation, Task, load_item


def open_item(ctx: Context, item: TaskItem) -> Task:
    """Return the task of an item, after its downloads, which are recorded in `ctx.externals`."""
    task = load_item(item)
    task.check()

    def check() -> None:
        if ctx.should_stop():
            raise ctx.stop(f"the download for task {item.task}")

    task.fetch(check)
    ctx.externals += [source for source in task.sources() if source not in ctx.externals]
    return task


def shuffled_places(count: int, seed: int) -> array[int]:
    """Return 0 … count − 1 shuffled; with seed 42 this is the order of nanochat's TaskMixture."""
    places = array("Q", range(count))
    random.Random(seed).shuffle(places)
    return places


class Mixture:
    """The conversations of all tasks, repeated by their epochs or weights, shuffled or task by task."""

    def __init__(
        self,
        items: Mapping[str, TaskItem],
        *,
        seed: int,
        order: Sequence[str] | None = None,
        load: Callable[[TaskItem], Task] = load_item,
    ) -> None:
        """Load the tasks of items by name; `order` has all names, for conversations task by task (None: shuffled)."""
        # By name, since the order of tasks in a file is not part of the key.
        ordered = {name: items[name] for name in (sorted(items) if order is None else order)}
        self._tasks = [load(item) for item in ordered.values()]
        self._names = list(ordered)
        self._sizes = [len(task) for task in self._tasks]
        if empty := [name for name, size in zip(ordered, self._sizes, strict=True) if not size]:
            raise ConfigError(f"no conversation of {', '.join(empty)} is left: start is beyond the split's last one")
        self._counts = _count(list(ordered.values()), self._sizes)
        self._ends = list(accumulate(self._counts))
        count = self._ends[-1]
        self._order = shuffled_places(count, seed) if order is None else array("Q", range(count))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Conversation:
        task, place = self._find(index)
        return self._tasks[task][place]

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def name(self, index: int) -> str:
        """Return a conversation's name for messages: its item and its number in the task, from 0."""
        task, place = self._find(index)
        return f"{self._names[task]} conversation {place}"

    def task_of(self, index: int) -> str:
        """Return the name of a conversation's item."""
        return self._names[self._find(index)[0]]

    def counts(self) -> dict[str, int]:
        """Return the number of conversations of each item, including repetitions."""
        return dict(zip(self._names, self._counts, strict=True))

    def tasks(self) -> dict[str, Task]:
        """Return item name → task."""
        return dict(zip(self._names, self._tasks, strict=True))

    def _find(self, index: int) -> tuple[int, int]:
        place = self._order[index]
        task = bisect_right(self._ends, place)
        return task, (place - self._ends[task] + self._counts[task]) % self._sizes[task]


def _count(items: Sequence[TaskItem], sizes: Sequence[int]) -> list[int]:
    """Return the number of conversations of each task in one pass.

    With weights, the total size of all tasks is divided in proportion to the weights; tasks with fewer conversations
    repeat, of others only the first are taken.
    """
    weights = [item.weight for item in items]
    if all(weight is None for weight in weights):
        return [size * item.epochs for item, size in zip(items, sizes, strict=True)]
    shares = [weight or 0.0 for weight in weights]
    return [max(1, round(sum(sizes) * share / sum(shares))) if share else 0 for share in shares]
