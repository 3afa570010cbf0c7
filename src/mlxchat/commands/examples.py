"""Model output to read in a terminal: examples of evaluations and RL, and samples of trainings."""

from __future__ import annotations

import shutil
import textwrap
from argparse import Namespace
from itertools import groupby
from pathlib import Path
from typing import Any

from mlxchat.commands.output import print_json, show_value
from mlxchat.errors import ConfigError, DataError, suggest, visible
from mlxchat.evals.examples import has_rollouts, read_examples, read_rollouts
from mlxchat.report.examples import verdict_of, with_calls
from mlxchat.store import attempts, locks
from mlxchat.store.files import Records, list_folder
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

_WIDEST = 110


def show_examples(folder: Path, options: Namespace) -> int:
    """Print examples of an evaluation's or RL's artifact, as the options of `mlxchat show` choose them.

    Raises:
        ConfigError: it has no such task or iteration.
        DataError: it has no examples, or they cannot be read.
    """
    if has_rollouts(folder):
        _show_rollouts(folder, which=options.examples, count=options.n, iteration=options.iteration)
    else:
        _show_answers(folder, which=options.examples, count=options.n, task=options.task)
    return 0


def _show_answers(folder: Path, *, which: str, count: int, task: str | None) -> None:
    """Print `count` examples, spread over the tasks, and how many of each task are right."""
    verdicts: dict[str, list[bool]] = {}
    chosen: dict[str, list[dict[str, Any]]] = {}
    for example in read_examples(folder):
        name, is_right = example["task"], bool(example["verdict"])
        verdicts.setdefault(name, []).append(is_right)
        found = chosen.setdefault(name, [])
        if len(found) < count and which in ("all", "right" if is_right else "wrong"):
            found.append(example)
    if task is not None and task not in verdicts:
        known = ", ".join(verdicts) or "none"
        raise ConfigError(f'{folder.name} has no task "{task}", it has {known}.{suggest(task, verdicts)}')
    tasks = [task] if task is not None else [*verdicts]
    for name in tasks:
        for example in chosen[name][: -(-count // len(tasks))]:
            verdict = verdict_of(example["output"] or "", example["expected"] or "", is_right=example["verdict"])
            seed = "" if example["seed"] is None else f"  seed {example['seed']}"
            tokens = "" if example["tokens"] is None else f"  {example['tokens']} tokens"
            print(visible(f"{name} {example['index']}{seed}  {verdict}{tokens}"))
            for title in ("prompt", "output", "expected"):
                if example[title] is not None:
                    _print_wrapped(title, example[title])
            details = {key: value for key, value in example["details"].items() if value and key != "finished"}
            for key, value in details.items():
                _print_wrapped(key, show_value(value))
            print()
    for name in tasks:
        print(f"{visible(name)}: {sum(verdicts[name])} of {len(verdicts[name])} right")


def _show_rollouts(folder: Path, *, which: str, count: int, iteration: int | None) -> None:
    """Print `count` questions of RL with their answers, best first; those of the last iteration come first."""
    answers = read_rollouts(folder)
    kept = sorted({answer["iteration"] for answer in answers})
    if iteration is not None and iteration not in kept:
        raise ConfigError(f"{folder.name} holds no answers of iteration {iteration}, but of {kept}")
    shown = 0
    for (of, number), group in groupby(answers, key=lambda each: (each["iteration"], each["question"])):
        question = list(group)
        wanted = [each for each in question if which in ("all", "right" if each["right"] else "wrong")]
        if iteration not in (None, of) or not wanted or shown == count:
            continue
        shown += 1
        right, mean = sum(each["right"] for each in question), sum(each["reward"] for each in question) / len(question)
        print(f"iteration {of}, question {number}: {right} of {len(question)} right, mean reward {mean:.3g}")
        _print_wrapped("asked", question[0]["prompt"])
        _print_wrapped("expected", question[0]["expected"])
        for answer in sorted(wanted, key=lambda each: (-each["reward"], each["sample"])):
            verdict = verdict_of(answer["output"], answer["expected"], is_right=answer["right"])
            parts = "".join(f"  {name} {value:.3g}" for name, value in answer["parts"].items())
            numbers = f"reward {answer['reward']:.3g}{parts}  advantage {answer['advantage']:+.3f}"
            cut = "" if answer["finished"] else "  cut"
            print(visible(f"  {verdict}  {numbers}  {answer['tokens']} tokens{cut}"))
            _print_wrapped("", answer["output"])
        print()
    print(f"iterations with answers (--iteration N): {', '.join(map(str, kept)) or 'none'}")


def show_samples(store: Store, name: str, *, as_json: bool) -> int:
    """Print what a model wrote on each prompt over the iterations of its training, or those of an evaluation.

    Raises:
        DataError: there are no samples.
        StoreError: nothing has this name.
    """
    title, path = _find_samples(store, name)
    found = [{key: record.get(key) for key in ("iteration", "prompt", "text")} for record in Records(path).read()]
    if as_json:
        print_json(found)
        return 0
    print(visible(title))
    for prompt in dict.fromkeys(str(record["prompt"]) for record in found):
        print(f"\n{printable(prompt)}")
        for record in found:
            if record["prompt"] == prompt:
                _print_wrapped("" if record["iteration"] is None else str(record["iteration"]), str(record["text"]))
    if not found:
        print("no samples yet")
    return 0


def _find_samples(store: Store, name: str) -> tuple[str, Path]:
    """Return a title and the samples file of a step in progress, or of an artifact."""
    for key in list_folder(store.outputs / "work"):
        work = store.work(key)
        executions = attempts.read(work)
        if executions and executions[-1].get("step") == name and locks.is_held(store.lock(key)):
            return f"{name}, in progress ({work})", work / "ckpt" / "records" / "samples.jsonl"
    place = resolve(store, name)
    if not (place / "samples.jsonl").is_file():
        raise DataError(f"{place.name} has no samples, which only pretrainings and evaluations with prompts have")
    return place.name, place / "samples.jsonl"


def printable(text: str) -> str:
    """Return generated text with control characters escaped."""
    return visible(with_calls(text).replace("\t", "    "))


def _print_wrapped(title: str, text: str) -> None:
    """Print the wrapped lines of a text, the first one next to a title."""
    width = min(_WIDEST, shutil.get_terminal_size((100, 24)).columns)
    title = f"  {visible(title):<9}"
    for line in printable(text).splitlines() or [""]:
        for part in textwrap.wrap(line, max(20, width - len(title)), drop_whitespace=False) or [""]:
            print(f"{title}{part}".rstrip())
            title = " " * len(title)
