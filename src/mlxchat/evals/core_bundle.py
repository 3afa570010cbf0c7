"""CORE's data: nanochat's eval bundle, a zip or its unpacked folder, read in place.

The zip is never unpacked: members are read by their names in `core.yaml`, so nothing in it decides where a file goes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mlxchat.config.schema import CoreConfig
from mlxchat.errors import DataError, suggest
from mlxchat.hub import client
from mlxchat.runner.keys import UNKNOWN
from mlxchat.store.fingerprint import hash_file

SHUFFLE_SEED = 1337
# Limit of one unpacked file (nanochat's largest has 8 MB), against zip bombs.
_MOST_BYTES = 512 << 20
_LABEL = re.compile(r"\w[\w.-]*")  # also the name of the task's journal
_FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


@dataclass(frozen=True, kw_only=True)
class CoreTask:
    """One of CORE's tasks."""

    label: str
    kind: str
    """multiple_choice, schema or language_modeling."""
    data: str
    """Path of its .jsonl below eval_data/."""
    num_fewshot: int
    delimiter: str
    """Between a question and its continuation."""
    baseline: float
    """Accuracy of guessing, 0 … 1."""


def contents_of(config: CoreConfig, hash_of: Callable[[Path], str]) -> list[str]:
    """Return the sha256 of CORE's bundle, for a key: a file and a URL with equal contents give equal keys."""
    if "://" not in config.bundle:
        return [hash_of(Path(config.bundle))]
    return [client.find_content(config.bundle, config.sha256) or f"{UNKNOWN}{config.bundle}"]


class Bundle:
    """The bundle's tasks and their examples."""

    def __init__(self, path: Path) -> None:
        """Open a zip or a folder, with or without a top folder `eval_bundle/`.

        Raises:
            DataError: it is neither, or has no core.yaml.
        """
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._root = ""
        if path.is_dir():
            roots = [path / "eval_bundle", path]
            found = [root for root in roots if (root / "core.yaml").is_file()]
            self._folder = found[0] if found else path
        else:
            try:
                self._zip = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(
                    f"{path}: not a readable zip or folder ({error}); expected nanochat's eval_bundle.zip"
                ) from None
            found_names = [name for name in self._zip.namelist() if name.rpartition("/")[2] == "core.yaml"]
            self._root = min(found_names, key=len).removesuffix("core.yaml") if found_names else ""
            found = [path] if found_names else []
        if not found:
            raise DataError(f"{path}: has no core.yaml; expected nanochat's eval bundle")

    @cached_property
    def sha256(self) -> str:
        """Hash of the zip; of a folder, of the names and contents of the files that CORE reads."""
        if self._zip is not None:
            return hash_file(self.path)
        digest = hashlib.sha256()
        for name in ["core.yaml", "eval_meta_data.csv", *sorted(f"eval_data/{task.data}" for task in self.tasks)]:
            digest.update(f"{name}\0{hashlib.sha256(self._read(name)).hexdigest()}\n".encode())
        return digest.hexdigest()

    @cached_property
    def tasks(self) -> list[CoreTask]:
        """All tasks, in the bundle's order.

        Raises:
            DataError: core.yaml or eval_meta_data.csv is malformed, or a task has no baseline.
        """
        try:
            rows = csv.DictReader(io.StringIO(self._read("eval_meta_data.csv").decode()))
            baselines = {row["Eval Task"]: row["Random baseline"] for row in rows}
            tasks = [
                CoreTask(
                    label=str(task["label"]),
                    kind=str(task["icl_task_type"]),
                    data=str(task["dataset_uri"]),
                    num_fewshot=int(task["num_fewshot"][0]),
                    delimiter=str(task.get("continuation_delimiter", " ")),
                    baseline=0.01 * float(baselines[task["label"]]),
                )
                for task in yaml.safe_load(self._read("core.yaml"))["icl_tasks"]
            ]
        except (
            KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, csv.Error, yaml.YAMLError
        ) as error:  # fmt: skip
            raise DataError(
                f"{self.path}: core.yaml and eval_meta_data.csv do not describe tasks ({type(error).__name__}: {error})"
            ) from None
        if problems := list(_find_problems(tasks)):
            raise DataError(f"{self.path}: {'; '.join(problems)}")
        return tasks

    def choose(self, labels: list[str] | None) -> list[CoreTask]:
        """Return the tasks with these labels, in the bundle's order; None: all.

        Raises:
            DataError: labels are unknown.
        """
        if labels is None:
            return self.tasks
        known = [task.label for task in self.tasks]
        for label in labels:
            if label not in known:
                raise DataError(f"{self.path}: has no task {label!r}.{suggest(label, known)} Tasks: {', '.join(known)}")
        return [task for task in self.tasks if task.label in labels]

    def examples(self, task: CoreTask, max_per_task: int | None = None) -> list[dict[str, Any]]:
        """Return a task's examples in nanochat's order: shuffled with a fixed seed, then the first `max_per_task`.

        Raises:
            DataError: a line is not an example of the task's type, or there are too few for the shots.
        """
        items: list[dict[str, Any]] = []
        for number, line in enumerate(self._read(f"eval_data/{task.data}").split(b"\n"), 1):
            if line.strip():
                items.append(_parse(line, task, f"{self.path}: {task.data} line {number}"))
        random.Random(SHUFFLE_SEED).shuffle(items)
        if max_per_task is not None:
            items = items[:max_per_task]
        if len(items) <= task.num_fewshot:
            raise DataError(
                f"{self.path}: {task.label} shows {task.num_fewshot} other examples before each one and has "
                f"{len(items)} in all; use at least {task.num_fewshot + 1} per task"
            )
        return items

    def _read(self, name: str) -> bytes:
        try:
            path = self._folder / name if self._zip is None else self.path
            if self._zip is None and not path.resolve().is_relative_to(self._folder.resolve()):
                raise DataError(f"{self.path}: {name} leads out of the bundle")
            size = path.stat().st_size if self._zip is None else self._zip.getinfo(self._root + name).file_size
            if size > _MOST_BYTES:
                raise DataError(f"{self.path}: {name} has {size:,} bytes, expected at most {_MOST_BYTES:,}")
            return path.read_bytes() if self._zip is None else self._zip.read(self._root + name)
        except (OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            # RuntimeError: encrypted, or an unknown compression method.
            raise DataError(f"{self.path}: cannot read {name} ({error})") from None


def _find_problems(tasks: Sequence[CoreTask]) -> Iterator[str]:
    """Yield a message for each invalid task."""
    if not tasks:
        yield "core.yaml names no task"
    labels = [task.label for task in tasks]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        yield f"core.yaml has several tasks {label!r}"
    if unknown := sorted({task.kind for task in tasks} - _FIELDS.keys()):
        yield f"tasks of unknown type {', '.join(unknown)}; known: {', '.join(_FIELDS)}"
    for task in tasks:
        if not _LABEL.fullmatch(task.label):
            yield f"a task is called {task.label!r}, expected letters, digits, dots, - and _"
        if task.num_fewshot < 0 or not 0 <= task.baseline < 1:
            yield (
                f"{task.label} has {task.num_fewshot} shots and a baseline of {100 * task.baseline:g} %, expected at "
                "least 0 shots and a baseline of at least 0 and below 100 %"
            )


def _parse(line: bytes, task: CoreTask, where: str) -> dict[str, Any]:
    try:
        item = json.loads(line.decode())
        if not isinstance(item, dict):
            raise ValueError("not an object")
        missing = [field for field in _FIELDS[task.kind] if field not in item]
        if missing:
            raise ValueError(f"no {', '.join(missing)}")
        if task.kind != "language_modeling":
            options, gold = item["choices" if task.kind == "multiple_choice" else "context_options"], item["gold"]
            if not isinstance(options, list):
                raise ValueError("its options are not a list")
            if not isinstance(gold, int) or not 0 <= gold < len(options):
                raise ValueError(f"gold is {gold!r} of {len(options)}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not an example of type {task.kind} ({error})") from None
    return item
