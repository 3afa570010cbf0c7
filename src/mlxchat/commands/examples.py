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
from mlxchat.errors import ConfigError, DataError, StoreError, suggest, visible
from mlxchat.report.examples import verdict_of, with_calls
from mlxchat.store import attempts, locks
from mlxchat.store.files import Records, list_folder
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store
from mlxchat.tasks.answers import number_and_form

_MOST_CHARS = 1500
_WIDEST = 110


def show_examples(folder: Path, *, which: str, count: int, task: str | None) -> int:
    """Print examples of an evaluation's artifact; return the exit code.

    `which` is wrong, right or all; at most `count` examples are spread over the tasks; `task` None: all.

    Raises:
        ConfigError: the evaluation has no such task.
        DataError: the artifact has no examples, or they cannot be read.
    """
    from mlxchat.evals.examples import read_examples

    totals: dict[str, list[int]] = {}
    forms: dict[str, list[tuple[bool, bool]]] = {}
    chosen: dict[str, list[dict[str, Any]]] = {}
    for example in read_examples(folder):
        name, verdict = example["task"], bool(example["verdict"])
        total = totals.setdefault(name, [0, 0])
        total[0] += verdict
        total[1] += 1
        if pair := number_and_form(example["expected"] or "", example["output"] or ""):
            forms.setdefault(name, []).append(pair)
        if which == "all" or verdict == (which == "right"):
            found = chosen.setdefault(name, [])
            if len(found) < count:  # bounds memory for any number of examples
                found.append(example)
    if task is not None and task not in totals:
        raise ConfigError(
            f'{folder.name} has no task "{task}", it has {", ".join(totals) or "none"}.{suggest(task, totals)}'
        )
    groups = {name: found for name, found in chosen.items() if task is None or name == task}
    shown = list(islice(_in_turn(groups.values()), count))
    width, colour = _width(), sys.stdout.isatty()
    for example in sorted(shown, key=lambda each: (list(totals).index(each["task"]), each["index"])):
        print("\n".join(_describe(example, width, colour=colour)), end="\n\n")
    for name in [task] if task is not None else totals:
        right, asked = totals[name]
        number, form = (sum(side) for side in zip(*forms.get(name, [(False, False)]), strict=True))
        shares = f"; right number: {number}, right form: {form}" if len(forms.get(name, ())) == asked else ""
        print(f"{visible(name)}: {right} of {asked} right{shares}")
    if not shown:
        print(f"no {'' if which == 'all' else which + ' '}examples")
    return 0


def _in_turn(groups: Iterable[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield the first item of each group, then the second of each, and so on."""
    for row in zip_longest(*groups):
        yield from (item for item in row if item is not None)


def _describe(example: dict[str, Any], width: int, *, colour: bool) -> Iterator[str]:
    verdict = verdict_of(example["output"] or "", example["expected"] or "", is_right=example["verdict"])
    seed = "" if example["seed"] is None else f"  seed {example['seed']}"
    tokens = "" if example["tokens"] is None else f"  {example['tokens']} tokens"
    head = f"{visible(example['task'])} {example['index']}{seed}  {verdict}{tokens}"
    if colour:
        head = f"\033[{32 if verdict == 'right' else 31};1m{head}\033[0m"
    yield head
    for title in ("prompt", "output", "expected"):
        if example[title] is not None:
            yield from wrapped(title, example[title], width)
    details = _details(example["details"])
    if details:
        yield from wrapped("details", details, width)


def wrapped(title: str, text: str, width: int) -> Iterator[str]:
    """Yield the wrapped lines of a text, the first one next to a title."""
    text = printable(text)
    if len(text) > _MOST_CHARS:
        text = f"{text[: _MOST_CHARS // 2]} […] {text[-_MOST_CHARS // 2 :]}"
    title = f"  {title:<9}"
    for line in text.splitlines() or [""]:
        indent = re.match(r" *", line)
        assert indent is not None
        parts = textwrap.wrap(
            line, max(20, width - len(title)), drop_whitespace=False, subsequent_indent=indent[0][:20]
        )  # fmt: skip
        for part in parts or [""]:
            yield f"{title}{part}".rstrip()
            title = " " * len(title)


def printable(text: str) -> str:
    """Return generated text with control characters escaped."""
    return visible(with_calls(text).replace("\t", "    "))


def _details(details: dict[str, Any]) -> str:
    """Return an example's further details, one per line, with short numbers."""
    lines = []
    for name, value in details.items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {_short(item)}" for key, item in value.items())
        elif isinstance(value, list):
            value = "  ".join(map(_short, value))
        if value is not None and value is not False and value != "" and (name, value) != ("finished", True):
            lines.append(f"{name}: {_short(value)}".rstrip())
    return "\n".join(lines)


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
    if iteration is not None and iteration not in kept:
        told = f"answers of {len(kept)} are kept, {kept[0]} to {kept[-1]}" if kept else "no answers are kept"
        raise ConfigError(f"{folder.name} holds no answers of iteration {iteration}: {told}")
    questions = [
        list(group) for _, group in groupby(answers, key=lambda answer: (answer["iteration"], answer["question"]))
    ]
    width, colour = _width(), sys.stdout.isatty()
    shown = 0
    for question in questions:
        wanted = [answer for answer in question if which == "all" or answer["right"] == (which == "right")]
        if shown < count and wanted and iteration in (None, question[0]["iteration"]):
            shown += 1
            print("\n".join(_describe_question(question, wanted, width, colour=colour)), end="\n\n")
    for each in kept if iteration is None else [iteration]:
        if each in (kept[0], kept[-1], iteration):
            own = [answer for answer in answers if answer["iteration"] == each]
            print(f"iteration {each}: {sum(answer['right'] for answer in own)} of {len(own)} kept answers right")
    if not shown:
        print(f"no {'' if which == 'all' else which + ' '}answers")
    elif iteration is None and len(kept) > 1:
        print(f"answers of {len(kept)} iterations are kept, {kept[0]} to {kept[-1]}: --iteration N shows one")
    return 0


def _describe_question(
    question: list[dict[str, Any]], wanted: list[dict[str, Any]], width: int, *, colour: bool
) -> Iterator[str]:
    first = question[0]
    right = sum(answer["right"] for answer in question)
    mean = sum(answer["reward"] for answer in question) / len(question)
    head = f"iteration {first['iteration']}, question {first['question']}: {right} of {len(question)} right, "
    head = visible(f"{head}mean reward {mean:.3g}")
    yield f"\033[1m{head}\033[0m" if colour else head
    yield from wrapped("asked", first["prompt"], width)
    yield from wrapped("expected", first["expected"], width)
    for answer in sorted(wanted, key=lambda each: (-each["reward"], each["sample"])):
        verdict = verdict_of(answer["output"], first["expected"], is_right=answer["right"])
        parts = "".join(f"  {name} {value:.3g}" for name, value in answer["parts"].items())
        cut = "" if answer["finished"] else "  cut"
        line = f"  {verdict}  reward {answer['reward']:.3g}{parts}  advantage {answer['advantage']:+.3f}  "
        line = visible(f"{line}{answer['tokens']} tokens{cut}")
        yield f"\033[{32 if answer['right'] else 31}m{line}\033[0m" if colour else line
        yield from wrapped("", answer["output"], width)


def show_samples(store: Store, name: str, *, last: bool, as_json: bool) -> int:
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
    if last and found:
        found = [record for record in found if record["iteration"] == found[-1]["iteration"]]
    if as_json:
        print_json(found)
        return 0
    print(visible(title))
    width, by_prompt = _width(), dict.fromkeys(record["prompt"] for record in found)
    for prompt in by_prompt:
        print(f"\n{printable(prompt)}")
        for record in found:
            if record["prompt"] == prompt:
                iteration = "" if record["iteration"] is None else visible(str(record["iteration"]))
                print("\n".join(wrapped(iteration, record["text"], width)))
    if not found:
        print("no samples yet")
    return 0


def _find_samples(store: Store, name: str) -> tuple[str, Path]:
    """Return a title and the samples file of a running step, or of an artifact.

    Raises:
        DataError: there are no samples.
        StoreError: nothing has this name.
    """
    work = store.outputs / "work"
    running = [
        (str(executions[-1].get("started")), work / key)
        for key in list_folder(work)
        if (executions := attempts.read(work / key)) and name in (executions[-1].get("step"), key)
    ]
    held = [(when, folder) for when, folder in running if locks.is_held(store.lock(folder.name))]
    try:
        place = None if held else resolve(store, name)
    except StoreError:
        if not running:
            raise
        place = None  # a stopped training
    if place is None:
        folder = max(held or running)[1]
        state = "in progress" if held else "stopped before its end"
        return f"{name}, {state} ({folder})", folder / "ckpt" / "records" / "samples.jsonl"
    if not (place / "samples.jsonl").is_file():
        raise DataError(f"{place.name} has no samples, which only pretrainings and evaluations with prompts have")
    return place.name, place / "samples.jsonl"


def _width() -> int:
    return min(_WIDEST, shutil.get_terminal_size((100, 24)).columns)
