"""CORE: the mean centred accuracy of a base model on 22 tasks (DCLM's metric).

Counterpart of nanochat/core_eval.py, with its prompts, draws and verdicts. Examples are batched by length; common
prefixes of options are computed once (`branching.py`), and only the scored logits. Results are journaled per batch, so
a killed evaluation resumes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.config.schema import CoreConfig
from mlxchat.errors import Interrupted
from mlxchat.evals.branching import Continuation, Row, make_batches, make_rows
from mlxchat.evals.core_bundle import Bundle, CoreTask
from mlxchat.evals.core_journal import Journal
from mlxchat.evals.core_questions import Question, TextEncoder, build_question, draw_shots, render_prompts
from mlxchat.evals.language_model import LanguageModel
from mlxchat.evals.scores import Score, mean_centered, mean_centered_stderr
from mlxchat.hub.client import fetch_url, record
from mlxchat.runner.context import Context
from mlxchat.runner.progress import Progress

# Examples tokenized at a time: bounds memory, and leaves enough variety for full batches.
_WINDOW_EXAMPLES = 512


@dataclass(frozen=True, kw_only=True)
class TaskScore(Score):
    """The result of one task."""

    task: CoreTask
    extended: int = 0
    """Examples whose prompt was computed beyond the model's context."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for scores.json."""
        return {
            "accuracy": self.accuracy, "centered": self.centered, "stderr": self.stderr,
            "num_examples": self.num_examples, "num_fewshot": self.task.num_fewshot, "type": self.task.kind,
            "baseline": self.task.baseline, "extended": self.extended, "cropped": self.cropped,
        }  # fmt: skip


@dataclass(kw_only=True)
class CoreResult:
    """The results of all requested tasks."""

    scores: list[TaskScore]
    bundle_sha256: str
    max_per_task: int | None
    is_whole: bool
    """True if these are all tasks of the bundle."""
    long_prompts: str = "extend"
    """Rule for prompts longer than the context: extend or cut."""
    context_tokens: int | None = None
    """The model's context."""
    seconds: float = 0.0
    """Spent by this process."""
    computed: int = 0
    """Examples that this process computed."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """For each example: task, index, seed, prompt, output, expected, verdict, tokens, details."""

    @property
    def core(self) -> float | None:
        """The mean of the centred accuracies; None if tasks were left out."""
        return mean_centered(self.scores) if self.is_whole else None

    @property
    def stderr(self) -> float | None:
        """Standard error of CORE over examples, for fixed tasks."""
        return mean_centered_stderr(self.scores) if self.is_whole else None

    @property
    def examples_per_second(self) -> float | None:
        """Speed of this process; None if everything came from journals."""
        return self.computed / self.seconds if self.computed and self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for scores.json; it has no times, so equal evaluations give equal data."""
        return {
            "core": self.core, "stderr": self.stderr, "max_per_task": self.max_per_task,
            "bundle_sha256": self.bundle_sha256, "long_prompts": self.long_prompts,
            "context_tokens": self.context_tokens,
            "tasks": {score.task.label: score.to_dict() for score in self.scores},
        }  # fmt: skip


def evaluate_core(
    model: LanguageModel,
    tokenizer: TextEncoder,
    bundle: Path,
    *,
    max_per_task: int | None,
    tasks: list[str] | None,
    long_prompts: str = "extend",
    batch_tokens: int,
    work: Path,
    progress: Callable[[int, str], Progress],
    should_stop: Callable[[], bool] = lambda: False,
    stop: Callable[[str], Exception] | None = None,
) -> CoreResult:
    """Return a base model's results on CORE.

    Args:
        model: to evaluate.
        tokenizer: the model's.
        bundle: nanochat's eval_bundle.zip, or its unpacked folder.
        max_per_task: examples of each task, at most; None: all. The shots are drawn from these.
        tasks: labels; None: all.
        long_prompts: for prompts longer than the model's context: "extend" computes them whole if the model can, as
            nanochat does; "cut" drops their beginning.
        batch_tokens: tokens per forward pass, which bounds the memory.
        work: folder for the journals, kept between attempts.
        progress: maps a number of examples and their name to a display.
        should_stop: called between batches.
        stop: maps a position to the exception to raise; None: `Interrupted`.

    Raises:
        DataError: the bundle cannot be read, lacks a task, or has too few examples for the shots.
        Interrupted: `should_stop` returned True; the same call resumes.
    """
    opened = Bundle(bundle)
    chosen = opened.choose(tasks)
    whole = len(chosen) == len(opened.tasks)
    rule = long_prompts if model.extends else "cut"
    limit = model.context_tokens if rule == "cut" else None
    result = CoreResult(
        scores=[], bundle_sha256=opened.sha256, max_per_task=max_per_task, is_whole=whole, long_prompts=rule,
        context_tokens=model.context_tokens,
    )  # fmt: skip
    about = {
        "bundle": opened.sha256, "max_per_task": max_per_task, "long_prompts": rule,
        "context_tokens": model.context_tokens,
    }  # fmt: skip
    began = time.monotonic()
    for number, task in enumerate(chosen, 1):
        items = opened.examples(task, max_per_task)
        journal = Journal(work / f"{task.label}.jsonl", about)
        done = len(journal.records)
        with progress(len(items), f"examples of {task.label} ({number}/{len(chosen)})") as display:
            display.start = done
            display.update(done)
            for results in answer_examples(model, tokenizer, task, items, batch_tokens, journal.records, limit=limit):
                journal.append(results)
                result.computed += len(results)
                speed = (len(journal.records) - done) / max(1e-9, time.monotonic() - display.began)
                display.update(len(journal.records), speed=f"{speed:.1f} examples/s")
                if should_stop():
                    where = f"{task.label}, CORE's task {number} of {len(chosen)}"
                    raise stop(where) if stop else Interrupted(f"CORE stopped at {where}", signal.SIGTERM)
            records = [journal.records[index] for index in range(len(items))]
            result.examples.extend({"task": f"core/{task.label}", **record} for record in records)
            result.scores.append(score := score_task(task, records, model.context_tokens))
            if score.cropped or score.extended:
                action = "cut to it" if score.cropped else "computed beyond it"
                display.note(
                    f"{task.label}: {score.cropped or score.extended:,} of {len(items):,} prompts are longer than the "
                    f"context of {model.context_tokens:,} tokens; {action}"
                )
    result.seconds = time.monotonic() - began
    return result


def score_task(task: CoreTask, records: list[dict[str, Any]], context_tokens: int) -> TaskScore:
    """Return the score of a task from the results of all its examples."""
    return TaskScore(
        task=task,
        kind=task.kind,
        chance=task.baseline,
        accuracy=float(np.mean([record["verdict"] for record in records])),
        num_examples=len(records),
        extended=sum(record["tokens"] > context_tokens for record in records),
        cropped=sum(record["details"]["cropped"] for record in records),
    )


def answer_examples(
    model: LanguageModel,
    tokenizer: TextEncoder,
    task: CoreTask,
    items: list[dict[str, Any]],
    batch_tokens: int,
    known: Container[int] = (),
    *,
    limit: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the results of a task's examples per batch; completely known batches are skipped.

    Batches do not depend on `known`, so resuming gives identical results. `limit`: longest prompt in tokens,
    others are cut; None: no limit.
    """

    def prepare(window: list[int]) -> tuple[list[Question], list[list[Row]]]:
        questions = [build_question(task, items, index, tokenizer, limit) for index in window]
        groups = [[Continuation(*each) for each in question.scored()] for question in questions]
        return questions, make_batches(make_rows(groups, batch_tokens), batch_tokens)

    # Groups common prefixes; with few-shot examples there are none.
    order = list(range(len(items)))
    if not task.num_fewshot:
        order.sort(key=lambda index: render_prompts(task, items[index], [])[0])
    windows = [order[start : start + _WINDOW_EXAMPLES] for start in range(0, len(order), _WINDOW_EXAMPLES)]
    windows = [window for window in windows if any(index not in known for index in window)]
    with ThreadPoolExecutor(1, thread_name_prefix="core") as pool:
        # Tokenizes the next window while the model computes this one.
        coming = pool.submit(prepare, windows[0]) if windows else None
        for place in range(len(windows)):
            assert coming is not None
            questions, batches = coming.result()
            coming = pool.submit(prepare, windows[place + 1]) if place + 1 < len(windows) else None
            for batch in batches:
                asked = sorted({name for row in batch for name in row.groups})
                if any(questions[name].index not in known for name in asked):
                    found = _score(model, task, batch)
                    yield [_judge(task, items, questions[name], found[name], tokenizer) for name in asked]


def _score(model: LanguageModel, task: CoreTask, batch: list[Row]) -> dict[int, list[np.ndarray[Any, Any]]]:
    """Return predicted ids or losses of the sequences of each example of a batch."""
    predict: Callable[[Sequence[Row]], Sequence[Sequence[np.ndarray[Any, Any]]]] = model.losses
    if task.kind == "language_modeling":
        predict = model.predictions
    parts = predict(batch)
    found: dict[int, list[np.ndarray[Any, Any]]] = {}
    for row, values in zip(batch, parts, strict=True):
        for group, value in zip(row.groups, values, strict=True):
            found.setdefault(group, []).append(value)
    return found


def _judge(
    task: CoreTask,
    items: list[dict[str, Any]],
    question: Question,
    found: list[np.ndarray[Any, Any]],
    tokenizer: TextEncoder,
) -> dict[str, Any]:
    """Return an example's record for examples.parquet, with its verdict."""
    item = items[question.index]
    details: dict[str, Any] = {
        "shots": draw_shots(question.index, len(items), task.num_fewshot), "cropped": question.cropped,
    }  # fmt: skip
    prompts = render_prompts(task, item, [])
    if question.gold is None:
        predicted, expected = found[0].tolist(), question.sequences[0][question.starts[0] :]
        prompt, output, wanted = prompts[0], tokenizer.decode(predicted), str(item["continuation"])
        verdict = bool(expected) and predicted == expected
    else:
        losses = mean_losses(found)
        chosen = likeliest(losses)
        details["losses"] = losses
        options = item["choices" if task.kind == "multiple_choice" else "context_options"]
        prompt = str(item["query"] if task.kind == "multiple_choice" else item["continuation"])
        output, wanted, verdict = str(options[chosen]), str(options[question.gold]), chosen == question.gold
    return {
        "index": question.index, "seed": None, "prompt": prompt, "output": output, "expected": wanted,
        "verdict": verdict, "tokens": max(question.ends), "details": details,
    }  # fmt: skip


def mean_losses(losses: Sequence[np.ndarray[Any, Any]]) -> list[float | None]:
    """Return the mean loss of each option; None where none of its tokens is scored."""
    return [float(np.mean(each, dtype=np.float64)) if len(each) else None for each in losses]


def likeliest(losses: Sequence[float | None]) -> int:
    """Return the option with the lowest mean loss, the first of equals.

    In nanochat an option without scored tokens (a prefix of all others) has NaN: chosen if it comes first, otherwise
    never.
    """
    if losses[0] is None:
        return 0
    return min((loss, place) for place, loss in enumerate(losses) if loss is not None)[1]


def measure_core(
    ctx: Context, model: LanguageModel, tokenizer: TextEncoder, *, batch_tokens: int, examples: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return a model's results on CORE's tasks as data of scores.json; None if eval.core is null.

    Args:
        ctx: of a stage that declares `eval`; gets metrics and externals.
        model: to evaluate.
        tokenizer: the model's.
        batch_tokens: tokens per forward pass.
        examples: gets a row for every example.

    Raises:
        DataError: the bundle cannot be read or fetched.
        Interrupted: the run was asked to stop; the next attempt continues.
    """
    config = ctx.config.eval.core
    if config is None:
        return None
    result = evaluate_core(
        model, tokenizer, open_bundle(ctx, config), max_per_task=config.max_per_task, tasks=config.tasks,
        long_prompts=config.long_prompts, batch_tokens=batch_tokens, work=ctx.work / "core", progress=ctx.progress,
        should_stop=ctx.should_stop, stop=ctx.stop,
    )  # fmt: skip
    examples += result.examples
    measured = {"core": result.core, "core_examples_per_second": result.examples_per_second}
    ctx.metrics |= {name: value for name, value in measured.items() if value is not None}
    return result.to_dict()


def open_bundle(ctx: Context, config: CoreConfig) -> Path:
    """Return the path of CORE's bundle; fetch it if it has a URL, and record that once in ctx.externals.

    Raises:
        DataError, PassingError: it cannot be fetched.
    """
    if "://" not in config.bundle:
        return Path(config.bundle)
    bundle = fetch_url(config.bundle, sha256=config.sha256)
    source = {"name": "eval_bundle", **record(bundle)}
    ctx.externals += [source] if source not in ctx.externals else []
    return bundle
