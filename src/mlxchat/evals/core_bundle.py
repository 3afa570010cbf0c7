"""CORE's data: nanochat's eval bundle, a zip or its unpacked folder, read in place."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mlxchat.config.pins import UNKNOWN
from mlxchat.config.schema import CoreConfig
from mlxchat.errors import DataError, suggest
from mlxchat.hub import client
from mlxchat.runner.context import Context
from mlxchat.store.fingerprint import hash_file

SHUFFLE_SEED = 1337
_LABEL = re.compile(r"\w[\w.-]*")  # also the name of the task's journal, which must not leave its folder


@dataclass(frozen=True, kw_only=True)
class CoreTask:
    """One of CORE's tasks."""

    label: str
    kind: str  # multiple_choice, schema or language_modeling
    data: str  # path of its .jsonl below eval_data/
    num_fewshot: int
    delimiter: str  # between a question and its continuation
    baseline: float  # accuracy of guessing, 0 … 1

    def options(self, item: dict[str, Any]) -> list[str]:
        """Return the options of an example; language modelling has none."""
        found: list[str] = item.get("choices" if self.kind == "multiple_choice" else "context_options", [])
        return found


def contents_of(config: CoreConfig, hash_of: Callable[[Path], str]) -> list[str]:
    """Return the sha256 of CORE's bundle, for a key: a file and a URL with equal contents give equal keys."""
    if "://" not in config.bundle:
        return [hash_of(Path(config.bundle))]
    return [client.find_content(config.bundle, config.sha256) or f"{UNKNOWN}{config.bundle}"]


def open_bundle(ctx: Context, config: CoreConfig) -> Bundle:
    """Return CORE's bundle; fetch it if it has a URL, and record that once in ctx.externals."""
    if "://" not in config.bundle:
        return Bundle(Path(config.bundle))
    path = client.fetch_url(config.bundle, sha256=config.sha256)
    source = {"name": "eval_bundle", **client.record(path)}
    ctx.externals += [source] if source not in ctx.externals else []
    return Bundle(path)


class Bundle:
    """The bundle's tasks and their examples. Every method raises DataError if a file is absent or malformed."""

    def __init__(self, path: Path) -> None:
        """Open a zip or a folder, with or without a top folder `eval_bundle/`."""
        self.path = path
        try:
            top = path if path.is_dir() else zipfile.Path(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a zip or folder ({error}); expected nanochat's eval bundle") from None
        self._root = top / "eval_bundle" if (top / "eval_bundle" / "core.yaml").is_file() else top

    @cached_property
    def sha256(self) -> str:
        """Hash of the zip; of a folder, of the names and contents of the files that CORE reads."""
        if self.path.is_file():
            return hash_file(self.path)
        digest = hashlib.sha256()
        for name in ["core.yaml", "eval_meta_data.csv", *sorted(f"eval_data/{task.data}" for task in self.tasks)]:
            digest.update(f"{name}\0{hashlib.sha256(self._read(name).encode()).hexdigest()}\n".encode())
        return digest.hexdigest()

    @cached_property
    def tasks(self) -> list[CoreTask]:
        """All tasks, in the bundle's order."""
        described, table = self._read("core.yaml"), self._read("eval_meta_data.csv")
        try:
            rows = csv.DictReader(io.StringIO(table))
            baselines = {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in rows}
            tasks = [
                CoreTask(
                    label=str(task["label"]),
                    kind=str(task["icl_task_type"]),
                    data=str(task["dataset_uri"]),
                    num_fewshot=int(task["num_fewshot"][0]),
                    delimiter=str(task.get("continuation_delimiter", " ")),
                    baseline=baselines[task["label"]],
                )
                for task in yaml.safe_load(described)["icl_tasks"]
            ]
        except (KeyError, TypeError, ValueError, IndexError, yaml.YAMLError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{self.path}: core.yaml and eval_meta_data.csv do not describe tasks ({reason})") from None
        if wrong := [task.label for task in tasks if not _LABEL.fullmatch(task.label)]:
            raise DataError(f"{self.path}: {wrong[0]!r} is no name of a task")
        return tasks

    def choose(self, labels: list[str] | None) -> list[CoreTask]:
        """Return the tasks with these labels, in the bundle's order; None: all."""
        known = [task.label for task in self.tasks]
        for label in labels or ():
            if label not in known:
                raise DataError(f"{self.path}: has no task {label!r}.{suggest(label, known)} Tasks: {', '.join(known)}")
        return [task for task in self.tasks if labels is None or task.label in labels]

    def examples(self, task: CoreTask, max_per_task: int | None = None) -> list[dict[str, Any]]:
        """Return a task's examples in nanochat's order: shuffled with a fixed seed, then the first `max_per_task`."""
        lines = self._read(f"eval_data/{task.data}").split("\n")
        try:
            items: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise DataError(f"{self.path}: {task.data} is not JSON by lines ({error})") from None
        random.Random(SHUFFLE_SEED).shuffle(items)
        items = items[:max_per_task]
        if len(items) <= task.num_fewshot:
            raise DataError(
                f"{self.path}: {task.label} shows {task.num_fewshot} other examples before each one and has "
                f"{len(items)} in all; use at least {task.num_fewshot + 1} per task"
            )
        return items

    def _read(self, name: str) -> str:
        try:
            return (self._root / name).read_bytes().decode()
        except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path}: cannot read {name} of the eval bundle ({error})") from None
