"""Tasks: conversations to train on, questions to evaluate with. Loading one imports only its own module."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, cast

from mlxchat.errors import ConfigError, suggest
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import SPLITS, Task

_TASKS = {
    "facts": ("facts", "Facts"),
    "facts_mc": ("facts", "FactsMC"),
    "reading_mc": ("facts", "ReadingMC"),
    "kinds_mc": ("facts", "KindsMC"),
    "arithmetic": ("arithmetic", "Arithmetic"),
    "spelling": ("spelling", "Spelling"),
    "letter_count": ("spelling", "LetterCount"),
    "identity": ("jsonl", "Identity"),
    "jsonl": ("jsonl", "Jsonl"),
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

__all__ = ["SPLITS", "Conversation", "Task", "load_task", "task_class", "task_names", "task_options"]


def task_names() -> list[str]:
    """Return the names of all tasks."""
    return list(_TASKS)


def task_class(name: str) -> type[Task]:
    """Return the class of a task; its `kind` and `chance` are there without loading any data.

    Raises:
        ConfigError: no task has this name.

    """
    if name not in _TASKS:
        raise ConfigError(f'task is "{name}", expected one of {", ".join(_TASKS)}.{suggest(name, _TASKS)}')
    module, cls = _TASKS[name]
    return cast(type[Task], getattr(importlib.import_module(f"mlxchat.tasks.{module}"), cls))


def task_options(name: str) -> list[str]:
    """Return the names of the options that a task takes.

    Raises:
        ConfigError: no task has this name.

    """
    return [option for option in inspect.signature(task_class(name)).parameters if option != "split"]


def load_task(name: str, split: str, **options: Any) -> Task:
    """Make a task ready to use.

    Args:
        name: one of `task_names()`.
        split: one of the task's `splits`.
        options: those of the task's class: `size` and `seed` everywhere, others by task.

    Raises:
        ConfigError: the name, the split or an option is unknown, or an option's value is out of range.
        DataError: the data behind the task is missing or unreadable.

    """
    cls = task_class(name)
    known = task_options(name)
    for option in options:
        if option not in known:
            expected = ", ".join(known)
            hint = suggest(option, known)
            raise ConfigError(f'task {name} has no option "{option}", expected one of {expected}.{hint}')
    return cls(split, **options)
