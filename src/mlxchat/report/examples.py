"""Questions of the evals with what the model made of them: of each task one that is right and one that is wrong.

Of RL answers that it sampled: of its first and its last iteration a question that taught something, best and worst.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.report.collect import RunReport
from mlxchat.report.sources import mapping, number, read_jsonl, text
from mlxchat.report.wording import cut, with_calls

log = logging.getLogger(__name__)

# Of a suite with more tasks, such as CORE's 22, only so many are shown.
MOST_TASKS = 8
_CHARACTERS = 700


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question."""

    task: str
    is_right: bool
    prompt: str
    output: str
    expected: str


def example_groups(report: RunReport) -> dict[str, list[Example]]:
    """Return step → some of its questions, for each that kept them: RL's and, last, those of the evals."""
    found = {step.name: rollout_examples(step.folder) for step in report.steps if step.folder is not None}
    found |= {step.name: read_examples(step.folder) for step in report.evals if step.folder is not None}
    return {name: examples for name, examples in found.items() if examples}


def read_examples(folder: Path) -> list[Example]:
    """Return, of each task, the first question that was answered right and the first that was not.

    Prefers questions that have an answer to show. What is absent or damaged is left out.
    """
    rows = _parquet_rows(folder / "examples.parquet") or read_jsonl(folder / "examples.jsonl")
    chosen: dict[tuple[str, bool], dict[str, Any]] = {}
    for row in rows:
        chosen.setdefault((text(row.get("task")), _is_right(row)), row)
    tasks = list(dict.fromkeys(task for task, _ in chosen))[:MOST_TASKS]
    pairs = [(task, verdict) for task in tasks for verdict in (True, False) if (task, verdict) in chosen]
    return [_example(task, verdict, chosen[task, verdict]) for task, verdict in pairs]


def rollout_examples(folder: Path) -> list[Example]:
    """Return the best and the worst answer to a question of the first iteration and to one of the last.

    None where nothing was kept; what is damaged is left out.
    """
    questions: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for line in read_jsonl(folder / "rollouts.jsonl"):
        iteration, question = number(line.get("iteration")), number(line.get("question"))
        if iteration is not None and question is not None and number(line.get("reward")) is not None:
            questions.setdefault((iteration, question), []).append(line)
    iterations = sorted({iteration for iteration, _ in questions})
    found = []
    for iteration in dict.fromkeys([*iterations[:1], *iterations[-1:]]):
        groups = [
            sorted(group, key=lambda line: -float(line["reward"]))
            for (of, _), group in questions.items()
            if of == iteration
        ]
        answers = next((group for group in groups if group[0]["reward"] != group[-1]["reward"]), groups[0])
        found += [_rollout_example(line) for line in (answers[0], answers[-1])]
    return found


def _rollout_example(line: dict[str, Any]) -> Example:
    advantage = number(line.get("advantage"))
    told = f"iteration {line['iteration']:g}, reward {line['reward']:.3g}"
    told += f", advantage {advantage:+.3g}" if advantage is not None else ""
    return Example(
        task=told,
        is_right=bool(line.get("right")),
        prompt=cut(with_calls(text(line.get("prompt"))).strip("\n"), _CHARACTERS),
        output=cut(with_calls(text(line.get("output"))).strip("\n"), _CHARACTERS),
        expected=cut(text(line.get("expected")).strip("\n"), _CHARACTERS),
    )


def _is_right(row: dict[str, Any]) -> bool:
    return bool(row.get("verdict", row.get("correct")))


def _example(task: str, is_right: bool, row: dict[str, Any]) -> Example:
    prompt = text(row.get("prompt", row.get("question"))).strip("\n")
    output = with_calls(text(row.get("output", row.get("answer")))).strip("\n")
    # Few-shot prompts are long, and the question is at their end.
    shown = prompt if len(prompt) <= _CHARACTERS else f"… {prompt[-_CHARACTERS:]}"
    expected = cut(text(row.get("expected")).strip("\n"), _CHARACTERS)
    return Example(task=task, is_right=is_right, prompt=shown, output=cut(output, _CHARACTERS), expected=expected)


def _rows_at(file: Any, positions: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the rows at ascending positions, a group of rows in memory at a time."""
    begin = 0
    for group in range(file.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        if inside := [position - begin for position in positions if begin <= position < end]:
            yield from map(mapping, file.read_row_group(group).take(inside).to_pylist())
        begin = end


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Return the first right and the first wrong row of each task; a large file is not read whole into Python."""
    if not path.is_file():
        return []
    try:
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            keys = file.read(columns=["task", "verdict"])
            pairs = zip(keys.column("task").to_pylist(), keys.column("verdict").to_pylist(), strict=True)
            first: dict[tuple[Any, Any], int] = {}
            for position, key in enumerate(pairs):
                first.setdefault(key, position)
            return list(_rows_at(file, sorted(first.values())))
    except Exception as fault:  # pyarrow has a dozen kinds of errors for damaged files
        log.warning("%s cannot be read and is left out of the report: %s", path, fault)
        return []
