"""Tasks: conversations to train on and questions to evaluate with. Loading a task imports only its module.

To add a task: derive a class from `Task` in a module of this folder, add it to _TASKS, and use it in a mixture
(`conf/mixture`) or a suite (`conf/suite`). Users name their own classes as `module:Class`; the task `jsonl` reads
conversations from a file.

An item of a mixture or suite (`TaskItem`) names a task and its options; `find_item_problems` checks it without data.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mlxchat.config.parts import is_own, load_part
from mlxchat.config.schema import TaskItem
from mlxchat.errors import ConfigError, suggest
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import SPLITS, Task

_TASKS = {
    "facts": ("facts", "Facts"),
    "facts_mc": ("facts", "FactsMC"),
    "reading_mc": ("facts", "ReadingMC"),
    "kinds_mc": ("facts", "KindsMC"),
    "everyday": ("everyday", "Everyday"),
    "arithmetic": ("arithmetic", "Arithmetic"),
    "first_questions": ("everyday", "FirstQuestions"),
    "practice": ("practice", "Practice"),
    "spelling": ("spelling", "Spelling"),
    "letter_count": ("spelling", "LetterCount"),
    "first_letter_count": ("spelling", "FirstLetterCount"),
    "identity": ("jsonl", "Identity"),
    "jsonl": ("jsonl", "Jsonl"),
    "pairs": ("pairs", "Pairs"),
    "identity_conversations": ("jsonl", "IdentityConversations"),
    "smoltalk": ("benchmarks", "SmolTalk"),
    "mmlu": ("benchmarks", "MMLU"),
    "gsm8k": ("benchmarks", "GSM8K"),
    "arc_easy": ("benchmarks", "ArcEasy"),
    "arc_challenge": ("benchmarks", "ArcChallenge"),
    "humaneval": ("benchmarks", "HumanEval"),
    "spelling_bee": ("spelling", "SpellingBee"),
    "simple_spelling": ("spelling", "SimpleSpelling"),
}

__all__ = [
    "SPLITS",
    "Conversation",
    "Task",
    "find_item_problems",
    "load_item",
    "load_task",
    "task_class",
    "task_names",
    "task_options",
]


def task_names() -> list[str]:
    """Return the names of all tasks."""
    return list(_TASKS)


def task_class(name: str) -> type[Task]:
    """Return the class of a task; no data is loaded.

    Args:
        name: one of `task_names()`, or a user's `module:Class`.

    Raises:
        ConfigError: no task has this name.

    """
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


def task_options(name: str) -> list[str]:
    """Return the names of a task's options.

    Raises:
        ConfigError: no task has this name.

    """
    return [option for option in inspect.signature(task_class(name)).parameters if option != "split"]


def load_task(name: str, split: str, **options: Any) -> Task:
    """Return a task.

    Args:
        name: one of `task_names()`, or `module:Class`.
        split: one of the task's `splits`.
        options: fields of the task's class; all tasks have `size` and `seed`.

    Raises:
        ConfigError: the name, the split or an option is unknown, or an option's value is out of range.
        DataError: the task's data is missing or unreadable.

    """
    cls = task_class(name)
    known = task_options(name)
    for option in options:
        if option not in known:
            expected = ", ".join(known)
            hint = suggest(option, known)
            raise ConfigError(f'task {name} has no option "{option}", expected one of {expected}.{hint}')
    return cls(split, **options)


def load_item(item: TaskItem) -> Task:
    """Return the task that an item of a mixture or suite describes.

    Raises:
        ConfigError: its name, split or options are wrong.
        DataError: its data cannot be read.
    """
    options = {"size": item.size, "path": item.path, "fields": item.fields, **item.options, **item.source}
    task = load_task(item.task, item.split, **{key: value for key, value in options.items() if value is not None})
    return task.select(item.start, item.stop, item.step)


def contents_of(item: TaskItem, hash_of: Callable[[Path], str]) -> list[str]:
    """Return what a task downloads for the step's key: repository, files and commit, or the sha256 of an address."""
    # A user's task may use its source in any way, so all of it is part of the key.
    own = [f"{key}={value}" for key, value in sorted(item.source.items())] if is_own(item.task) else []
    # Bundled tasks download nothing, and reading their text takes seconds.
    if task_class(item.task).needs is Task.needs:
        return own
    return [*own, *(source.content() for source in load_item(item).needs())]


def find_item_problems(where: str, items: Mapping[str, TaskItem], *, training: bool) -> Iterator[str]:
    """Yield a message for each problem of the items of a mixture or suite; no data is read.

    Args:
        where: the key of the items in the configuration.
        items: name → item.
        training: whether they are trained on, so that held-out splits are refused.
    """
    if not items:
        yield f"{where} is empty: give it at least one task"
    for name, item in items.items():
        yield from _item_problems(f"{where}.{name}", item, training=training)
    weighted = [name for name, item in items.items() if item.weight is not None]
    if weighted and len(weighted) < len(items):
        missing = ", ".join(name for name in items if name not in weighted)
        yield f"{where}: {', '.join(weighted)} has a weight, {missing} has none: give every task one, or none"
    elif weighted and not any(items[name].weight for name in weighted):
        yield f"{where}: all weights are 0"


def _item_problems(where: str, item: TaskItem, *, training: bool) -> Iterator[str]:
    try:
        cls = task_class(item.task)
    except ConfigError as error:
        yield f"{where}: {error}"
        return
    known, sources = task_options(item.task), cls.source_options
    numbers = [option for option in known if option not in (*cls.source_options, "path", "size", "fields")]
    strangers = [
        *(
            (f"{where}.options", option, numbers)
            for option, value in item.options.items()
            if option not in numbers and value is not None
        ),
        *((f"{where}.source", option, sources) for option in item.source if option not in sources),
        *((where, option, known) for option in ("path", "fields") if getattr(item, option) and option not in known),
    ]
    for place, option, expected in strangers:
        has = f", it has {', '.join(expected)}" if expected else ""
        yield f'{place}: task {item.task} has no "{option}"{has}.{suggest(option, expected)}'
    if item.split not in cls.splits:
        expected_splits = " or ".join(cls.splits)
        yield f'{where}.split is "{item.split}", expected {expected_splits}.{suggest(item.split, cls.splits)}'
    elif training and item.split not in cls.training_splits:
        instead = f" Train on {' or '.join(cls.training_splits)}" if cls.training_splits else ""
        yield f"{where}.split is {item.split}: held-out conversations are never trained on.{instead}"
    elif (cls.is_lazy and not strangers) or (item.task == "jsonl" and item.path is None):
        try:  # reads nothing yet
            fields, options = (None, {}) if strangers else (item.fields, item.options)
            load_item(replace(item, start=0, stop=None, step=1, size=None, fields=fields, options=options))
        except ConfigError as error:
            yield f"{where}: {error}"
    for key, least in (("size", 1), ("epochs", 1), ("start", 0), ("step", 1), ("weight", 0)):
        value = getattr(item, key)
        if value is not None and not value >= least:
            yield f"{where}.{key} is {value}, expected at least {least}{', or null for all' if key == 'size' else ''}"
    if item.stop is not None and item.stop <= item.start:
        yield f"{where}.stop is {item.stop}, expected more than start ({item.start}): no conversation is left"
    if item.size is not None and 1 <= item.size <= item.start:
        yield f"{where}.start is {item.start}, expected less than size ({item.size}): no conversation is left"
    if item.path is not None and not Path(item.path).is_file():
        yield f"{where}.path: no file {item.path}"
