"""Checks of local files: conversations and text are read in full while planning, so faults are found before a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxchat.config import Config, CorpusConfig, TaskItem
from mlxchat.data.sources import read_file
from mlxchat.errors import DataError, MlxchatError
from mlxchat.runner.plan import PlannedStep
from mlxchat.tasks.items import load_item


def check_local_files(config: Config, plan: Iterable[PlannedStep]) -> None:
    """Read all local files of the steps that are not done.

    Raises:
        DataError: with every line of every file that cannot be used.
    """
    sections = {name: getattr(config, name) for step in plan if not step.done for name in step.stage.config}
    faults: dict[str, list[str]] = {}
    for name, section in sections.items():
        for place, fault in _faults(name, section):
            faults.setdefault(fault, []).append(place)  # a mixture and its validation often share a file
    if faults:
        raise DataError("\n".join(f"{', '.join(places)}: {fault}" for fault, places in faults.items()))


def _faults(where: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the place in the configuration and the fault of every file that a section names."""
    if isinstance(value, TaskItem):
        if value.path is not None and (fault := _fault(repr(value), value.path, partial(load_item, value))):
            yield where, fault
    elif isinstance(value, CorpusConfig):
        for path in value.paths:
            if fault := _fault(path, path, partial(_read_text, path)):
                yield f"{where}.paths", fault
    elif is_dataclass(value):
        for field in fields(value):
            yield from _faults(f"{where}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _faults(f"{where}.{key}", item)


def _fault(key: str, path: str, read: Callable[[], object]) -> str:
    """Return what reading raises; kept until the file changes."""
    stamp = _stamp(path)
    if (key, stamp) not in _KNOWN:
        try:
            read()
            _KNOWN[key, stamp] = ""
        except MlxchatError as error:
            _KNOWN[key, stamp] = str(error)
    return _KNOWN[key, stamp]


# The jobs of a sweep and the trials of a search are planned one after the other in one process.
_KNOWN: dict[tuple[str, tuple[int, ...]], str] = {}


def _read_text(path: str) -> None:
    for _ in read_file(Path(path)):
        pass


def _stamp(path: str) -> tuple[int, ...]:
    """Return size, times and inode of a file."""
    try:
        status = Path(path).stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
