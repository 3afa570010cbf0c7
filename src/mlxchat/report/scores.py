"""What eval steps leave in scores.json, and samples of text, whatever version wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlxchat.report.sources import mapping, number, sequence, text

# Predictors that a model's bits per byte are compared with.
_BASELINES = ("ngram_order2", "untrained")
_THROUGHPUT = {
    "prefill_tokens_per_second": "prefill_tokens_per_second",
    "decode_tokens_per_second": "decode_tokens_per_second",
    "model_peak_memory_bytes": "peak_memory_bytes",
}
"""Metrics of an eval step by what they are called here."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and what the model made of it."""

    prompt: str
    text: str
    iteration: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """How well a checkpoint did on one task; all fractions lie in 0 to 1."""

    kind: str
    accuracy: float | None
    chance: float | None
    stderr: float | None
    num_examples: int | None
    num_seeds: int | None = None
    nanochat: tuple[float, float | None] | None = None
    """Accuracy by nanochat's verdicts and its standard error, where they differ from the task's own."""


@dataclass(frozen=True, kw_only=True)
class CoreTask:
    """One of CORE's tasks."""

    kind: str
    """multiple_choice, schema or language_modeling."""
    num_fewshot: int | None
    num_examples: int | None
    baseline: float | None
    accuracy: float | None
    stderr: float | None
    centered: float | None

    @property
    def centered_stderr(self) -> float | None:
        """Standard error of the centred accuracy."""
        if self.stderr is None or self.baseline is None or self.baseline >= 1:
            return None
        return self.stderr / (1 - self.baseline)


@dataclass(frozen=True, kw_only=True)
class Core:
    """The CORE metric of a base model."""

    value: float | None
    stderr: float | None
    max_per_task: int | None
    """Examples of each task at most; None: all."""
    tasks: dict[str, CoreTask]
    context_tokens: int | None = None
    """The model's context."""
    extended: int = 0
    """Examples whose prompt was computed beyond the context, as nanochat does."""
    cropped: int = 0
    """Examples whose prompt was cut to the context."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an eval step measured; None or empty where it did not measure."""

    checkpoint: str
    bpb: float | None = None
    perplexity: float | None = None
    """Of the same text, for each token."""
    train_bpb: float | None = None
    """Bits per byte of text that was trained on."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Bits per byte of other predictors of the same text: ngram_order2 and untrained."""
    core: Core | None = None
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    mean_centered: float | None = None
    chatcore: float | None = None
    """Mean centred accuracy of one of nanochat's own sets of tasks."""
    chatcore_stderr: float | None = None
    chatcore_nanochat: tuple[float, float | None] | None = None
    """ChatCORE by nanochat's verdicts and its standard error."""
    chatcore_tasks: list[str] = field(default_factory=list)
    pass_at_k: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    """With standard errors, where they are known."""
    throughput: dict[str, float] = field(default_factory=dict)
    """prefill_tokens_per_second, decode_tokens_per_second, peak_memory_bytes."""
    samples: list[Sample] = field(default_factory=list)


def parse_scores(raw: dict[str, Any], metrics: dict[str, Any] | None = None) -> Scores:
    """Return what scores.json says, and of the step's metrics how fast the model is on that machine."""
    speed = _numbers(metrics)
    bpb = _numbers(raw.get("bpb"))
    pass_at_k = mapping(raw.get("pass_at_k"))
    chatcore = mapping(raw.get("chatcore"))
    return Scores(
        checkpoint=text(raw.get("checkpoint")),
        bpb=bpb.get("val"),
        perplexity=bpb.get("perplexity"),
        train_bpb=bpb.get("train"),
        baselines={name: bpb[name] for name in _BASELINES if name in bpb},
        core=_parse_core(mapping(raw.get("core"))) if raw.get("core") else None,
        tasks={name: _parse_task(mapping(task)) for name, task in mapping(raw.get("tasks")).items()},
        mean_centered=number(raw.get("mean_centered")),
        chatcore=number(chatcore.get("value")),
        chatcore_stderr=number(chatcore.get("stderr")),
        chatcore_nanochat=_with_error(chatcore, "nanochat_value", "nanochat_stderr"),
        chatcore_tasks=[text(name) for name in sequence(chatcore.get("tasks"))],
        pass_at_k={
            int(k): (p, number(mapping(raw.get("pass_at_k_stderr")).get(k)))
            for k, v in pass_at_k.items()
            if k.isdecimal() and (p := number(v)) is not None
        },
        throughput=_numbers(raw.get("throughput"))
        or {name: speed[key] for key, name in _THROUGHPUT.items() if key in speed},
        samples=list(parse_samples(sequence(raw.get("samples")))),
    )


def mean_centered_stderr(scores: Scores) -> float | None:
    """Return the standard error of `mean_centered`, from those of its tasks; None where one is unknown."""
    errors = [
        task.stderr / (1 - task.chance)
        for task in scores.tasks.values()
        if task.stderr is not None and task.chance is not None and task.chance < 1
    ]
    return math.hypot(*errors) / len(errors) if errors and len(errors) == len(scores.tasks) else None


def last_samples(records: list[dict[str, Any]]) -> list[Sample]:
    """Return the samples of the last iteration that has any."""
    last = max((number(record.get("iteration")) or 0 for record in records), default=0)
    return list(parse_samples(r for r in records if (number(r.get("iteration")) or 0) == last))


def parse_samples(records: Iterable[object]) -> Iterator[Sample]:
    """Yield the samples among records."""
    for record in map(mapping, records):
        if "text" in record:
            iteration = number(record.get("iteration"))
            yield Sample(
                prompt=text(record.get("prompt")),
                text=text(record["text"]),
                iteration=None if iteration is None else int(iteration),
            )


def _parse_task(raw: dict[str, Any]) -> TaskScore:
    return TaskScore(
        kind=text(raw.get("kind")),
        accuracy=number(raw.get("accuracy")),
        chance=number(raw.get("chance")),
        stderr=number(raw.get("stderr")),
        num_examples=_whole(raw.get("num_questions")) or _whole(raw.get("num_examples")),
        num_seeds=_whole(raw.get("seeds")),
        nanochat=_with_error(raw, "nanochat_accuracy", "nanochat_stderr"),
    )


def _with_error(raw: dict[str, Any], name: str, error: str) -> tuple[float, float | None] | None:
    value = number(raw.get(name))
    return None if value is None else (value, number(raw.get(error)))


def _parse_core(raw: dict[str, Any]) -> Core:
    tasks, longer = {}, {"extended": 0, "cropped": 0}
    for name, task in ((name, mapping(task)) for name, task in mapping(raw.get("tasks")).items()):
        longer = {key: count + (_whole(task.get(key)) or 0) for key, count in longer.items()}
        tasks[name] = CoreTask(
            kind=text(task.get("type")),
            num_fewshot=_whole(task.get("num_fewshot")),
            num_examples=_whole(task.get("num_examples")),
            baseline=number(task.get("baseline")),
            accuracy=number(task.get("accuracy")),
            stderr=number(task.get("stderr")),
            centered=number(task.get("centered")),
        )
    return Core(
        value=number(raw.get("core")),
        stderr=number(raw.get("stderr")),
        max_per_task=_whole(raw.get("max_per_task")),
        tasks=tasks,
        context_tokens=_whole(raw.get("context_tokens")),
        **longer,
    )


def _numbers(raw: object) -> dict[str, float]:
    return {name: value for name, v in mapping(raw).items() if (value := number(v)) is not None}


def _whole(value: object) -> int | None:
    found = number(value)
    return None if found is None else int(found)
