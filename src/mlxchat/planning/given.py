"""Inputs that a plan does not produce: existing or imported models, and local files."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from mlxchat.config.schema import Config, CorpusConfig, EvalConfig, TaskItem
from mlxchat.data.sources import read_file, read_texts, text_files
from mlxchat.errors import ConfigError, DataError, MlxchatError
from mlxchat.model.sizes import GPTSizes
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.store import Store
from mlxchat.tasks import load_item, task_class
from mlxchat.tasks.jsonl import Jsonl

_ROLE = "checkpoint"


def check_given(config: Config, plan: list[PlannedStep]) -> None:
    """Check the inputs of pending steps: by their stages' forecasts, and local files.

    Raises:
        ConfigError: with all problems that the forecasts find, such as a teacher with another tokenizer.
        DataError: with every line of every file that cannot be used.
    """
    sizes, problems = find_given_sizes(config, plan), list[str]()
    for step in plan:
        if not step.done and (check := getattr(step.stage.load_forecast(), "problems", None)) is not None:
            problems += check(step.config, step, plan, sizes.get(step.name))
    if problems:
        raise ConfigError("\n".join(problems))
    check_local_files(config, plan)


# Models


def find_given_sizes(config: Config, plan: Iterable[PlannedStep]) -> dict[str, GPTSizes]:
    """Return step → model sizes for steps that import, lengthen, train or evaluate an existing model.

    Raises:
        DataError: a model to be imported is missing, or what describes it is damaged.
    """
    store = Store(Path(config.outputs))
    found: dict[str, GPTSizes] = {}
    for step in plan:  # inputs come first
        artifact = step.artifacts.get(_ROLE)
        sizes = getattr(step.stage.load_forecast(), "model_sizes", None)
        if sizes is not None and not step.stage.optional_inputs.keys() & {*step.inputs, *step.artifacts}:
            made = store.find(step.rid) if step.done else None
            found[step.name] = (
                sizes(getattr(step.config, step.stage.name, None)) if made is None else sizes_of_folder(made)
            )
        elif step.inputs.get(_ROLE) in found:
            found[step.name] = found[step.inputs[_ROLE]]
        elif artifact is not None and (folder := store.find(str(artifact["rid"]))) is not None:
            found[step.name] = sizes_of_folder(folder)
        change = getattr(step.stage.load_forecast(), "sizes_after", None)
        after = None if change is None else change(step.config, step.stage.name, found.get(step.name))
        if after is not None:
            found[step.name] = after
    return found


def sizes_of_folder(folder: Path) -> GPTSizes:
    """Return the sizes of the checkpoint in a folder, adapters included, without its weights."""
    from mlxchat.interop.names import sizes_from_hf

    return sizes_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder.name)


# Local files


def check_local_files(config: Config, plan: Iterable[PlannedStep]) -> None:
    """Read all local files of pending steps: conversations and text.

    Raises:
        DataError: with every line of every file that cannot be used.
    """
    sections: dict[int, tuple[str, Any]] = {}
    for step in plan:
        for name, section in {} if step.done else step.sections.items():
            is_own = section is not getattr(config, name)
            sections[id(section)] = (f"pipeline.{step.name}.with" if is_own else name, section)
    faults: dict[str, list[str]] = {}
    for where, section in sections.values():
        for place, fault in _faults(where, section):
            faults.setdefault(fault, []).append(place)  # a mixture and its validation often share a file
    if faults:
        raise DataError("\n".join(f"{', '.join(places)}: {fault}" for fault, places in faults.items()))


def describe_own_conversations(plan: Iterable[PlannedStep]) -> list[str]:
    """Return a line for each file of conversations of the pending steps: how many it has and how many are held out."""
    found: dict[str, None] = {}
    for step in plan:
        for name, section in {} if step.done else step.sections.items():
            for where, item in _nested(name, section):
                if isinstance(item, TaskItem) and item.path and issubclass(task_class(item.task), Jsonl):
                    task = cast(Jsonl, load_item(item))
                    count = f"{task.num_conversations:,} conversations, {task.num_held_out:,} held out"
                    found[f"{where}: {item.path} has {count}"] = None
    return list(found)


def _nested(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the place in the configuration and the value of a section and of every section in it."""
    if is_dataclass(value):
        yield where, value
        for field in fields(value):
            yield from _nested(f"{where}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nested(f"{where}.{key}", item)


def _faults(where: str, section: Any) -> Iterator[tuple[str, str]]:
    """Yield the place in the configuration and the fault of every file that a section names."""
    for place, value in _nested(where, section):
        if isinstance(value, TaskItem) and value.path is not None:
            if fault := _fault(repr(value), value.path, partial(load_item, value)):
                yield place, fault
        elif isinstance(value, CorpusConfig):
            for path in map(str, text_files(value.paths)):
                if fault := _fault(path, path, partial(_read_text, path)):
                    yield f"{place}.paths", fault
        elif isinstance(value, EvalConfig) and value.text is not None:
            read = partial(_read_column, Path(value.text), value.text_column)
            if fault := _fault(f"{value.text} {value.text_column}", value.text, read):
                yield f"{place}.text", fault


def _read_text(path: str) -> None:
    deque(read_file(Path(path)), maxlen=0)


def _read_column(path: Path, column: str) -> None:
    deque(read_texts(path, column), maxlen=0)


# By file and its state: a process plans all jobs of a sweep and all trials of a search.
_KNOWN: dict[tuple[str, tuple[int, ...]], str] = {}


def _fault(key: str, path: str, read: Callable[[], object]) -> str:
    """Return the message of the error that reading raises, "" if there is none; kept until the file changes."""
    stamp: tuple[int, ...] = ()
    with suppress(OSError):
        status = Path(path).stat()
        stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    if (key, stamp) not in _KNOWN:
        try:
            read()
            _KNOWN[key, stamp] = ""
        except MlxchatError as error:
            _KNOWN[key, stamp] = str(error)
    return _KNOWN[key, stamp]
