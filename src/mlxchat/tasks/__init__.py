"""Tasks: conversations to train on and questions to evaluate with. Loading a task imports only its module.

To add a task: derive a class from `Task` in a module of this folder, add it to _TASKS, and use it in a mixture
(`conf/mixture`) or a suite (`conf/suite`). Users name their own classes as `module:Class`; the task `jsonl` reads
conversations from a file.

An item of a mixture or suite (`TaskItem`) names a task and its options; `find_item_problems` checks it without data.
"""

import importlib
import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from mlxchat.config.pins import is_own, load_part
from mlxchat.config.schema import TaskItem
from mlxchat.errors import ConfigError, MlxchatError, suggest
from mlxchat.tasks.base import Conversation, Task

_TASKS = {
    "kinds_mc": ("quickstart", "KindsMC"),
    "everyday": ("quickstart", "Everyday"),
    "arithmetic": ("quickstart", "Arithmetic"),
    "first_questions": ("quickstart", "FirstQuestions"),
    "practice": ("quickstart", "Practice"),
    "first_letter_count": ("quickstart", "FirstLetterCount"),
    "identity": ("jsonl", "Identity"),
    "jsonl": ("jsonl", "Jsonl"),
    "pairs": ("jsonl", "Pairs"),
    "identity_conversations": ("jsonl", "IdentityConversations"),
    "smoltalk": ("downloads", "SmolTalk"),
    "mmlu": ("downloads", "MMLU"),
    "gsm8k": ("downloads", "GSM8K"),
    "arc_easy": ("downloads", "ArcEasy"),
    "arc_challenge": ("downloads", "ArcChallenge"),
    "humaneval": ("downloads", "HumanEval"),
    "spelling_bee": ("quickstart", "SpellingBee"),
    "simple_spelling": ("quickstart", "SimpleSpelling"),
}
CHATCORE_SETS: dict[str, tuple[str, ...]] = {
    "oct2025": ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee"),
    "jul2026": ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval"),
}
"""Tasks of ChatCORE in nanochat's snapshots; the two are not comparable."""

__all__ = [
    "CHATCORE_SETS", "Conversation", "Task", "chatcore_set", "find_item_problems", "load_item", "load_task",
    "task_class", "task_names",
]  # fmt: skip


def task_names() -> list[str]:
    """Return the names of all tasks."""
    return list(_TASKS)


def task_class(name: str) -> type[Task]:
    """Return the class of a task, one of `task_names()` or a user's `module:Class`; raises ConfigError."""
    if is_own(name):
        found = load_part(name)
        if not (isinstance(found, type) and issubclass(found, Task)):
            raise ConfigError(f"{name} is not a task: expected a class derived from mlxchat.tasks.Task")
        return found
    if name not in _TASKS:
        raise ConfigError(
            f'task is "{name}", expected one of {", ".join(_TASKS)}, or module:Class.{suggest(name, _TASKS)}'
        )
    module, cls = _TASKS[name]
    return cast(type[Task], getattr(importlib.import_module(f"mlxchat.tasks.{module}"), cls))


def load_task(name: str, split: str, **options: Any) -> Task:
    """Return a task (`task_class`), which reads its data when needed; a wrong option raises ConfigError."""
    cls = task_class(name)
    known = [option for option in inspect.signature(cls).parameters if option != "split"]
    for option in options:
        if option not in known:
            raise ConfigError(
                f'task {name} has no option "{option}", expected one of {", ".join(known)}.{suggest(option, known)}'
            )
    return cls(split, **options)


def load_item(item: TaskItem) -> Task:
    """Return the task that an item of a mixture or suite describes; raises ConfigError."""
    places = task_class(item.task).source_options
    for option in item.source:
        if option not in places:
            expected = f"expected one of {', '.join(places)}.{suggest(option, places)}" if places else "it has none"
            raise ConfigError(f'task {item.task} has no source "{option}", {expected}')
    options = {"size": item.size, "path": item.path, "fields": item.fields, **item.options, **item.source}
    task = load_task(item.task, item.split, **{key: value for key, value in options.items() if value is not None})
    return task.select(item.start, item.stop, item.step)


def contents_of(item: TaskItem, hash_of: Callable[[Path], str]) -> list[str]:
    """Return what a task downloads for the step's key: repository, files and commit, or the sha256 of an address."""
    # A user's task may use its source in any way, so all of it is part of the key.
    own = [f"{key}={value}" for key, value in sorted(item.source.items())] if is_own(item.task) else []
    return [*own, *(source.content() for source in load_item(item).needs())]


def find_item_problems(where: str, items: Mapping[str, TaskItem], *, training: bool) -> Iterator[str]:
    """Yield each problem of the items at the key `where`; no data is read. `training` refuses held-out splits."""
    if not items:
        yield f"{where} is empty: give it at least one task"
    for name, item in items.items():
        for problem in _item_problems(item, training=training):
            yield f"{where}.{name}{problem}"
    weights = [item.weight for item in items.values()]
    if None in weights and any(weight is not None for weight in weights):
        yield f"{where}: give every task a weight, or none of them"
    elif items and not any(weight is None or weight > 0 for weight in weights):
        yield f"{where}: all weights are 0"


def _item_problems(item: TaskItem, *, training: bool) -> Iterator[str]:
    try:
        task = load_item(item)
    except MlxchatError as error:
        yield f": {error}"
        return
    except (ValueError, OverflowError):  # NaN or infinity, reported with the other numbers
        return
    if training and item.split not in task.training_splits:
        instead = f" Train on {' or '.join(task.training_splits)}" if task.training_splits else ""
        yield f".split is {item.split}: held-out conversations are never trained on.{instead}"
    if item.epochs < 1:
        yield f".epochs is {item.epochs}, expected at least 1"
    if item.weight is not None and item.weight < 0:
        yield f".weight is {item.weight}, expected at least 0"
    if item.path is not None and not Path(item.path).is_file():
        yield f".path: no file {item.path}"


def chatcore_set(tasks: Container[str]) -> str | None:
    """Return the first set whose tasks are all among these."""
    return next((which for which, members in CHATCORE_SETS.items() if all(task in tasks for task in members)), None)
