"""What the model wrote: three telling answers of an evaluation, and samples of trainings."""

import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxchat.config.wording import plural
from mlxchat.errors import DataError
from mlxchat.report.collect import RunReport, Sample, StepReport, checkpoint_name, text
from mlxchat.tasks.base import number_and_form

SAMPLES_SHOWN = 8
_EXAMPLE_CHARACTERS = 700
_SAMPLE_CHARACTERS = 1500
_CALLS = (("<|python_end|><|output_start|>", "="), ("<|python_start|>", "<<"), ("<|output_end|>", ">>"))
_SPECIAL = re.compile(r"<\|(bos|user_start|user_end|assistant_start|assistant_end|python_\w+|output_\w+)\|>")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question, the model's answer, and whether it is right."""

    task: str
    is_right: bool
    prompt: str
    output: str
    expected: str

    @property
    def verdict(self) -> str:
        """Right, wrong, or wrong form."""
        return verdict_of(self.output, self.expected, is_right=self.is_right)


def verdict_of(output: str, expected: str, *, is_right: bool) -> str:
    """Return right, wrong form (the right number is there, but not after ####) or wrong."""
    number, form = number_and_form(expected, output) or (False, False)
    return "right" if is_right else "wrong form" if number and not form else "wrong"


def with_calls(output: str) -> str:
    """Return a model's text with calls of the calculator as GSM8K writes them, <<12+7=19>>, and no special tokens."""
    for token, shown in _CALLS:
        output = output.replace(token, shown)
    return _SPECIAL.sub("", output)


def telling_examples(report: RunReport) -> tuple[StepReport, dict[str, Example]] | None:
    """Return the last evaluation with examples, and of them a good, a bad and a typical answer.

    Good and bad are the answers of median length among the right and the wrong ones that the model wrote (for a model
    that wrote nothing, among its choices), each of another task where possible. Typical has the verdict that most
    answers of its task have, in the task whose accuracy is nearest to the mean of all tasks. No question occurs twice.
    """
    for step in reversed(report.evals):
        measured = {} if step.scores is None else {**step.scores.core_tasks, **step.scores.tasks}
        accuracy = {task: measure.value for task, measure in measured.items()}
        if step.folder is not None and (found := _telling(_rows(step.folder), accuracy)):
            return step, found
    return None


def _telling(rows: list[dict[str, Any]], measured: dict[str, float]) -> dict[str, Example]:
    # A choice shows the letter alone; a written answer shows how the model talks.
    written = [row for row in rows if len(text(row.get("output"))) > 2]
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in written or rows:
        tasks.setdefault(text(row.get("task")), []).append(row)
    if not tasks:
        return {}
    accuracy = {task: measured.get(task, sum(map(_is_right, found)) / len(found)) for task, found in tasks.items()}
    mean = sum(accuracy.values()) / len(accuracy)
    by_mean = sorted(tasks, key=lambda task: (abs(accuracy[task] - mean), task))
    best, worst = (sorted(tasks, key=lambda task: (sign * accuracy[task], task)) for sign in (-1, 1))
    chosen: dict[str, Example] = {}
    used: set[str] = set()
    shown: set[str] = set()
    for name, order, verdict in (("Good", best, True), ("Bad", worst, False), ("Typical", by_mean, None)):
        for task in sorted(order, key=lambda each: each in used):
            wanted = accuracy[task] >= 0.5 if verdict is None else verdict
            matching = sorted(
                (row for row in tasks[task] if _is_right(row) is wanted and _question(row) not in shown),
                key=lambda row: len(text(row.get("output"))),
            )
            if matching:
                middle = matching[len(matching) // 2]
                chosen[name] = _example(task, wanted, middle)
                used.add(task)
                shown.add(_question(middle))
                break
    return chosen


def sample_groups(report: RunReport) -> list[tuple[str, str, list[Sample]]]:
    """Return (step, title, samples) per step that has some, long texts cut and prompts not repeated."""
    groups = []
    for step in report.steps:
        if step.samples:
            iteration = step.samples[0].iteration
            of = f"of {checkpoint_name(step)}" if iteration is None else f"at iteration {iteration:,}"
            shown = []
            for sample in step.samples[:SAMPLES_SHOWN]:
                body = sample.text.removeprefix(sample.prompt).strip("\n")
                shown.append(replace(sample, prompt=cut(sample.prompt.strip("\n")), text=cut(body)))
            groups.append((step.name, f"Samples {of}", shown))
    return groups


def cut(body: str, most: int = _SAMPLE_CHARACTERS) -> str:
    """Return a text, or its beginning and how much is left out."""
    rest = len(body) - most
    return body if rest <= 0 else f"{body[:most]} … ({plural(rest, 'character')} more)"


def _question(row: dict[str, Any]) -> str:
    return text(row.get("prompt"))


def _is_right(row: dict[str, Any]) -> bool:
    return bool(row.get("verdict"))


def _example(task: str, is_right: bool, row: dict[str, Any]) -> Example:
    prompt = _question(row).strip("\n")
    output = with_calls(text(row.get("output"))).strip("\n")
    # Few-shot prompts are long, and the question is at their end.
    shown = prompt if len(prompt) <= _EXAMPLE_CHARACTERS else f"… {prompt[-_EXAMPLE_CHARACTERS:]}"
    expected = cut(text(row.get("expected")).strip("\n"), _EXAMPLE_CHARACTERS)
    output = cut(output, _EXAMPLE_CHARACTERS)
    return Example(task=task, is_right=is_right, prompt=shown, output=output, expected=expected)


# Of each task and verdict, so that a large file is not kept whole in memory.
_MOST_ROWS = 64


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Return some examples of each task and verdict of an evaluation; none if there are none or they are damaged."""
    from mlxchat.evals.examples import read_examples as read_rows

    counts: Counter[tuple[str, bool]] = Counter()
    found = []
    with suppress(DataError):
        for row in read_rows(folder):
            kind = text(row["task"]), _is_right(row)
            counts[kind] += 1
            if counts[kind] <= _MOST_ROWS:
                found.append(row)
    return found
