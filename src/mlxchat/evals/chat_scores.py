"""What chat tasks' scores are: accuracy against chance, its standard error, and ChatCORE over a whole set of tasks.

Counterpart of nanochat's chat_eval. Centred = (accuracy − chance) / (1 − chance): 0 is guessing, 1 is perfect.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlxchat.runner.context import Context

CHATCORE_SETS: dict[str, tuple[str, ...]] = {
    "oct2025": ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee"),
    "jul2026": ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval"),
}
"""Which tasks nanochat's snapshots average; numbers of the two are not comparable."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of one task."""

    kind: str
    accuracy: float
    """Mean over the questions, and over the samples of each."""
    chance: float
    num_examples: int
    """Questions."""
    per_seed: tuple[float, ...] = ()
    """Accuracy of each sample of all questions, where there are several."""
    variance: float | None = None
    """Variance, over the questions, of the share of right samples; None: that of one sample, p (1 − p)."""
    cropped: int = 0
    """Questions whose prompt was longer than the model's context."""
    nanochat: Score | None = None
    """The score by nanochat's verdicts, where they differ from the task's own (GSM8K)."""

    @classmethod
    def of_examples(
        cls, passes: Sequence[Sequence[Mapping[str, Any]]], *, kind: str, chance: float, cropped: int = 0
    ) -> Score:
        """Return the score of examples by sample and question, with nanochat's verdicts where they are recorded."""
        score = cls.of([[each["verdict"] for each in one] for one in passes], kind=kind, chance=chance, cropped=cropped)
        theirs = [[each["details"].get("nanochat_verdict") for each in one] for one in passes]
        if any(verdict is None for one in theirs for verdict in one) or not score.num_examples:
            return score
        return replace(score, nanochat=cls.of(theirs, kind=kind, chance=chance))

    @classmethod
    def of(cls, verdicts: Sequence[Sequence[bool]], *, kind: str, chance: float, cropped: int = 0) -> Score:
        """Return the score of verdicts by sample and question."""
        table = np.array(verdicts, dtype=np.float64)
        count = table.shape[1]
        several = len(table) > 1 and count > 0
        return cls(
            kind=kind, accuracy=float(table.mean()) if count else 0.0, chance=chance, num_examples=count,
            per_seed=tuple(float(row.mean()) for row in table) if several else (),
            variance=float(table.mean(0).var()) if several else None, cropped=cropped,
        )  # fmt: skip

    @property
    def centered(self) -> float:
        """Accuracy rescaled: 0 is chance, 1 is perfect."""
        return (self.accuracy - self.chance) / (1 - self.chance)

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy, for other questions and other samples: the samples of a question are one."""
        variance = self.accuracy * (1 - self.accuracy) if self.variance is None else self.variance
        return math.sqrt(variance / max(1, self.num_examples))

    @property
    def seed_stderr(self) -> float | None:
        """Standard error of the accuracy for other samples of the same questions; None with one sample."""
        if len(self.per_seed) < 2:
            return None
        return float(np.std(self.per_seed, ddof=1)) / math.sqrt(len(self.per_seed))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for scores.json."""
        numbers: dict[str, Any] = {
            "kind": self.kind, "accuracy": self.accuracy, "chance": self.chance, "centered": self.centered,
            "num_examples": self.num_examples, "num_questions": self.num_examples, "stderr": self.stderr,
        }  # fmt: skip
        if self.cropped:
            numbers["cropped"] = self.cropped
        if self.nanochat is not None:
            numbers |= {"nanochat_accuracy": self.nanochat.accuracy, "nanochat_stderr": self.nanochat.stderr}
        if self.per_seed:
            numbers |= {
                "seeds": len(self.per_seed), "per_seed": list(self.per_seed), "seed_stderr": self.seed_stderr,
            }  # fmt: skip
        return numbers


def mean_centered(scores: Sequence[Score]) -> float | None:
    """Return the mean of the centred scores (ChatCORE's formula), or None without scores."""
    return float(np.mean([score.centered for score in scores])) if scores else None


def mean_centered_stderr(scores: Sequence[Score]) -> float | None:
    """Return the standard error of `mean_centered`, from the questions' chance alone: the tasks are what they are."""
    if not scores:
        return None
    return math.sqrt(sum((score.stderr / (1 - score.chance)) ** 2 for score in scores)) / len(scores)


def chatcore(scores: Mapping[str, Score], tasks: Mapping[str, str]) -> dict[str, Any] | None:
    """Return ChatCORE with its standard error and the tasks it is of, None unless there is a whole set of them.

    By the tasks' own verdicts, and by nanochat's.

    Args:
        scores: by the suite's names.
        tasks: the registered task, on its test split, that each of the suite's names stands for.
    """
    found = {task: name for name, task in tasks.items() if name in scores}
    which = chatcore_set(found)
    if which is None:
        return None
    names = [found[task] for task in CHATCORE_SETS[which]]
    chosen = [scores[name] for name in names]
    theirs = [score.nanochat or score for score in chosen]
    return {
        "value": mean_centered(chosen), "stderr": mean_centered_stderr(chosen),
        "nanochat_value": mean_centered(theirs), "nanochat_stderr": mean_centered_stderr(theirs), "tasks": names,
        "set": which,
    }  # fmt: skip


def chatcore_set(tasks: Container[str]) -> str | None:
    """Return the first set whose tasks are all among these registered ones, evaluated on their test split."""
    return next((which for which, members in CHATCORE_SETS.items() if all(task in tasks for task in members)), None)


def record_suite(ctx: Context, results: Mapping[str, Score]) -> dict[str, Any]:
    """Return results on the configured suite as data of scores.json; their means become metrics of the step."""
    mean = mean_centered(list(results.values()))
    tasks = {name: item.task for name, item in sorted(ctx.config.suite.items()) if item.split == "test"}
    whole = chatcore(results, tasks)
    measured = {"mean_centered": mean, "chatcore": None if whole is None else whole["value"]}
    ctx.metrics |= {name: value for name, value in measured.items() if value is not None}
    scores = {name: score.to_dict() for name, score in results.items()}
    return {"tasks": scores, "mean_centered": mean, "chatcore": whole}
