"""Model output to read in a terminal: examples of evaluations and RL, and samples of trainings."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any

from mlxchat.commands.columns import print_json
from mlxchat.errors import ConfigError, DataError, suggest, visible
from mlxchat.report.examples import verdict_of, with_calls
from mlxchat.store import attempts, locks
from mlxchat.store.files import Records, list_folder
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

_MOST_CHARS = 1500
_WIDEST = 110
_GREEN, _RED, _BOLD = 32, 31, 1


def show_examples(folder: Path, *, which: str, count: int, task: str | None) -> int:
    """Print examples of an evaluation's artifact; return the exit code.

    `which` is wrong, right or all; at most `count` examples are spread over the tasks; `task` None: all.

    Raises:
        ConfigError: the evaluation has no such task.
        DataError: the artifact has no examples, or they cannot be read.
    """
    from mlxchat.evals.examples import read_examples

    verdicts: dict[str, list[bool]] = {}
    chosen: dict[str, list[dict[str, Any]]] = {}
    for example in read_examples(folder):
        name, is_right = example["task"], bool(example["verdict"])
        verdicts.setdefault(name, []).append(is_right)
        found = chosen.setdefault(name, [])
        if len(found) < count and (which == "all" or is_right == (which == "right")):
            found.append(example)
    if task is not None and task not in verdicts:
        raise ConfigError(
            f'{folder.name} has no task "{task}", it has {", ".join(verdicts) or "none"}.{suggest(task, verdicts)}'
        )
    tasks = [task] if task is not None else [*verdicts]
    shown = list(islice(_in_turn(chosen[name] for name in tasks), count))
    for example in sorted(shown, key=lambda each: tasks.index(each["task"])):
        _print_example(example)
    for name in tasks:
        print(f"{visible(name)}: {sum(verdicts[name])} of {len(verdicts[name])} right")
    return 0


def _in_turn(groups: Iterable[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield the first item of each group, then the second of each, and so on."""
    for row in zip_longest(*groups):
        yield from (item for item in row if item is not None)


def _print_example(example: dict[str, Any]) -> None:
    verdict = verdict_of(example["output"] or "", example["expected"] or "", is_right=example["verdict"])
    seed = "" if example["seed"] is None else f"  seed {example['seed']}"
    tokens = "" if example["tokens"] is None else f"  {example['tokens']} tokens"
    head = f"{example['task']} {example['index']}{seed}  {verdict}{tokens}"
    print(_coloured(head, _GREEN if example["verdict"] else _RED))
    for title in ("prompt", "output", "expected"):
        if example[title] is not None:
            _print_wrapped(title, example[title])
    if details := "\n".join(_describe_details(example["details"])):
        _print_wrapped("details", details)
    print()


def _describe_details(details: dict[str, Any]) -> Iterator[str]:
    """Yield a line with short numbers for each further detail."""
    for name, value in details.items():
        parts = [f"{key} {_short(item)}" for key, item in value.items()] if isinstance(value, dict) else [_short(value)]
        if value not in (None, False, "") and (name, value) != ("finished", True):
            yield f"{name}: {'  '.join(parts)}"


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def show_rollouts(folder: Path, *, which: str, count: int, iteration: int | None) -> int:
    """Print RL questions with their answers; return the exit code.

    `which` is wrong, right or all; at most `count` questions with such answers; `iteration` None: the last one, and
    earlier ones if it has too few.

    Raises:
        ConfigError: no answers of that iteration were kept.
        DataError: the answers cannot be read.
    """
    from mlxchat.evals.examples import read_rollouts

    answers = read_rollouts(folder)
    kept = sorted({answer["iteration"] for answer in answers})
    told = f"answers of {len(kept)} iterations are kept, {kept[0]} to {kept[-1]}" if kept else "no answers are kept"
    if iteration is not None and iteration not in kept:
        raise ConfigError(f"{folder.name} holds no answers of iteration {iteration}: {told}")
    asked = [answer for answer in answers if iteration in (None, answer["iteration"])]
    shown = 0
    for _, group in groupby(asked, key=lambda answer: (answer["iteration"], answer["question"])):
        question = list(group)
        wanted = [answer for answer in question if which == "all" or answer["right"] == (which == "right")]
        if shown < count and wanted:
            shown += 1
            _print_question(question, wanted)
    print(f"{told}: --iteration N shows one" if iteration is None else f"iteration {iteration} of {len(kept)}")
    return 0


def _print_question(question: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    first = question[0]
    right = sum(answer["right"] for answer in question)
    mean = sum(answer["reward"] for answer in question) / len(question)
    where = f"iteration {first['iteration']}, question {first['question']}"
    print(_coloured(f"{where}: {right} of {len(question)} right, mean reward {mean:.3g}", _BOLD))
    _print_wrapped("asked", first["prompt"])
    _print_wrapped("expected", first["expected"])
    for answer in sorted(wanted, key=lambda each: (-each["reward"], each["sample"])):
        verdict = verdict_of(answer["output"], first["expected"], is_right=answer["right"])
        parts = "".join(f"  {name} {value:.3g}" for name, value in answer["parts"].items())
        cut = "" if answer["finished"] else "  cut"
        numbers = f"reward {answer['reward']:.3g}{parts}  advantage {answer['advantage']:+.3f}"
        line = f"  {verdict}  {numbers}  {answer['tokens']} tokens{cut}"
        print(_coloured(line, _GREEN if answer["right"] else _RED))
        _print_wrapped("", answer["output"])
    print()


def show_samples(store: Store, name: str, *, as_json: bool) -> int:
    """Print what a model wrote on each prompt over the iterations of its training, or those of an evaluation.

    Raises:
        DataError: there are no samples.
        StoreError: nothing has this name.
    """
    title, path = _find_samples(store, name)
    found = [
        {"iteration": record.get("iteration"), "prompt": record["prompt"], "text": record["text"]}
        for record in Records(path).read()
        if isinstance(record.get("prompt"), str) and isinstance(record.get("text"), str)
    ]
    if as_json:
        print_json(found)
        return 0
    print(visible(title))
    for prompt in dict.fromkeys(record["prompt"] for record in found):
        print(f"\n{printable(prompt)}")
        for record in found:
            if record["prompt"] == prompt:
                _print_wrapped("" if record["iteration"] is None else str(record["iteration"]), record["text"])
    if not found:
        print("no samples yet")
    return 0


def _find_samples(store: Store, name: str) -> tuple[str, Path]:
    """Return a title and the samples file of a step in progress, or of an artifact.

    Raises:
        DataError: there are no samples.
        StoreError: nothing has this name.
    """
    work = store.outputs / "work"
    for key in list_folder(work):
        executions = attempts.read(work / key)
        if executions and executions[-1].get("step") == name and locks.is_held(store.lock(key)):
            return f"{name}, in progress ({work / key})", work / key / "ckpt" / "records" / "samples.jsonl"
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
    text = printable(text)
    if len(text) > _MOST_CHARS:
        text = f"{text[: _MOST_CHARS // 2]} […] {text[-_MOST_CHARS // 2 :]}"
    title = f"  {visible(title):<9}"
    for line in text.splitlines() or [""]:
        indent = str(re.match(r" *", line)[0])[:20]  # type: ignore[index]  # it always matches
        room = max(20, width - len(title))
        for part in textwrap.wrap(line, room, drop_whitespace=False, subsequent_indent=indent) or [""]:
            print(f"{title}{part}".rstrip())
            title = " " * len(title)


def _coloured(line: str, colour: int) -> str:
    line = visible(line)
    return f"\033[{colour}{'' if colour == _BOLD else ';1'}m{line}\033[0m" if sys.stdout.isatty() else line
