"""The one schema of scores: evaluations write it into scores.json, and report, comparison and model cards read it.

`Score` is what an evaluation measured of one task. `read_scores` turns scores.json into `Measure`s: every number with
its metric, unit, chance, count of questions and standard error. Whether less or more of a metric is better is declared
in `metrics` of the stages (`runner.stage.best_of`). Counterpart of nanochat's chat_eval: centred =
(accuracy − chance) / (1 − chance), 0 is guessing, 1 is perfect.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pvariance, stdev
from typing import Any

from mlxchat.tasks import CHATCORE_SETS, chatcore_set
from mlxchat.tasks.base import number_and_form


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of one task."""

    kind: str
    accuracy: float  # mean over the questions, and over the samples of each
    chance: float
    num_examples: int  # questions
    per_seed: tuple[float, ...] = ()  # accuracy of each sample, if there are several
    any_right: float | None = None  # fraction of questions with a right sample (nanochat's pass rate with -n above 1)
    variance: float | None = None
    """Variance over questions of the fraction of right samples; None: one sample, p (1 − p)."""
    cropped: int = 0  # questions whose prompt was longer than the model's context
    nanochat: Score | None = None  # the score by nanochat's verdicts, if they differ from ours (GSM8K)
    number_and_form: tuple[float, float] | None = None
    """Shares of answers with the right number, and with a number after ####, if all expected answers have one."""

    @classmethod
    def of_examples(
        cls, passes: Sequence[Sequence[Mapping[str, Any]]], *, kind: str, chance: float, cropped: int = 0
    ) -> Score:
        """Return the score of examples by sample and question, with nanochat's verdicts if recorded."""
        score = cls.of([[each["verdict"] for each in one] for one in passes], kind=kind, chance=chance, cropped=cropped)
        found = [number_and_form(each["expected"], each["output"]) for one in passes for each in one]
        pairs = [pair for pair in found if pair]
        if pairs and len(pairs) == len(found):
            number, form = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            score = replace(score, number_and_form=(number, form))
        theirs = [[each["details"].get("nanochat_verdict") for each in one] for one in passes]
        if any(verdict is None for one in theirs for verdict in one) or not score.num_examples:
            return score
        return replace(score, nanochat=cls.of(theirs, kind=kind, chance=chance))

    @classmethod
    def of(cls, verdicts: Sequence[Sequence[bool]], *, kind: str, chance: float, cropped: int = 0) -> Score:
        """Return the score of verdicts by sample and question."""
        shares = [fmean(of_question) for of_question in zip(*verdicts, strict=True)]
        several = len(verdicts) > 1 and bool(shares)
        return cls(
            kind=kind, accuracy=fmean(shares) if shares else 0.0, chance=chance, num_examples=len(shares),
            per_seed=tuple(map(fmean, verdicts)) if several else (),
            any_right=fmean(share > 0 for share in shares) if several else None,
            variance=pvariance(shares) if several else None, cropped=cropped,
        )  # fmt: skip

    @property
    def centered(self) -> float:
        """Accuracy rescaled: 0 is chance, 1 is perfect."""
        return (self.accuracy - self.chance) / (1 - self.chance)

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy over questions and samples; a question's samples are one cluster."""
        variance = self.accuracy * (1 - self.accuracy) if self.variance is None else self.variance
        return math.sqrt(variance / max(1, self.num_examples))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for scores.json."""
        numbers: dict[str, Any] = {
            "kind": self.kind, "accuracy": self.accuracy, "chance": self.chance, "centered": self.centered,
            "num_examples": self.num_examples, "num_questions": self.num_examples, "stderr": self.stderr,
        }  # fmt: skip
        if self.cropped:
            numbers["cropped"] = self.cropped
        if self.number_and_form is not None:
            numbers["right_number"], numbers["right_form"] = self.number_and_form
        if self.nanochat is not None:
            numbers |= {"nanochat_accuracy": self.nanochat.accuracy, "nanochat_stderr": self.nanochat.stderr}
        if self.per_seed:
            numbers |= {
                "seeds": len(self.per_seed), "per_seed": list(self.per_seed),
                # Over samples of the same questions.
                "seed_stderr": stdev(self.per_seed) / math.sqrt(len(self.per_seed)), "any_right": self.any_right,
            }  # fmt: skip
            if self.nanochat is not None:
                numbers["nanochat_any_right"] = self.nanochat.any_right
        return numbers


def mean_centered(scores: Sequence[Score]) -> float | None:
    """Return the mean of the centred scores (ChatCORE's formula), or None without scores."""
    return fmean(score.centered for score in scores) if scores else None


def mean_centered_stderr(scores: Sequence[Score]) -> float | None:
    """Return the standard error of `mean_centered`, over questions, for fixed tasks."""
    if not scores:
        return None
    return math.sqrt(sum((score.stderr / (1 - score.chance)) ** 2 for score in scores)) / len(scores)


def chatcore(scores: Mapping[str, Score], tasks: Mapping[str, str]) -> dict[str, Any] | None:
    """Return ChatCORE of the first set whose tasks are all there, or None: our verdicts, nanochat's, errors, tasks.

    `tasks` are names in the suite → registered tasks, for those on the test split.
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


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of an evaluation, with what is needed to show and compare it."""

    name: str  # label in tables: val bpb, CORE, the name of a task, pass@4
    metric: str  # one of METRICS
    value: float
    stderr: float | None = None
    chance: float | None = None  # accuracy of guessing
    num_questions: int | None = None
    kind: str = ""  # categorical, generative, multiple_choice, schema or language_modeling
    shots: int | None = None
    any_right: tuple[float, int] | None = None
    """Fraction of questions with a right sample, and samples per question, if several."""
    conditions: Hashable = None  # measures of one name are comparable if these are equal

    @property
    def is_share(self) -> bool:
        """True for a fraction of questions, shown as a percentage."""
        return self.metric in ("task", "form", "pass_at_k")

    @property
    def centered(self) -> float | None:
        """Accuracy rescaled: 0 is chance, 1 is perfect."""
        return None if self.chance is None else (self.value - self.chance) / (1 - self.chance)

    @property
    def centered_stderr(self) -> float | None:
        """Standard error of the centred accuracy."""
        return None if self.stderr is None or self.chance is None else self.stderr / (1 - self.chance)


METRICS = ("val_bpb", "perplexity", "text_bpb", "core", "task", "form", "chatcore", "mean_centered", "pass_at_k", "own")
"""The metrics of measures in the order of tables. task, form, pass_at_k: shares, more is better; own: users'
functions."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The results of one evaluation."""

    checkpoint: str = ""
    measures: dict[str, Measure] = field(default_factory=dict)  # by name, in the order of METRICS
    baselines: dict[str, float] = field(default_factory=dict)
    """Bits per byte of other predictors of the same text: ngram_order2 and untrained."""
    core_tasks: dict[str, Measure] = field(default_factory=dict)
    core_conditions: dict[str, int] = field(default_factory=dict)
    """max_per_task, context_tokens, and the examples whose prompts were `extended` or `cropped`, as far as known."""
    chatcore_tasks: tuple[str, ...] = ()

    @property
    def tasks(self) -> dict[str, Measure]:
        """Accuracies on the suite's tasks."""
        return {name: measure for name, measure in self.measures.items() if measure.metric == "task"}

    def find(self, metric: str) -> Measure | None:
        """Return the first measure of a metric."""
        return next((measure for measure in self.measures.values() if measure.metric == metric), None)


def read_scores(raw: Mapping[str, Any]) -> Scores:
    """Return the contents of scores.json; absent or malformed numbers are left out."""
    bpb, core, chat, text = (mapping(raw.get(key)) for key in ("bpb", "core", "chatcore", "text"))
    in_core, tasks = mapping(core.get("tasks")), mapping(raw.get("tasks"))
    counts = {key: core.get(key) for key in ("max_per_task", "context_tokens")}
    counts |= {key: sum(task.get(key) or 0 for task in in_core.values()) for key in ("extended", "cropped")}
    conditions = {key: int(count) for key, count in counts.items() if count}
    chat_tasks = tuple(chat.get("tasks") or ())
    found = [
        _measure("val bpb", "val_bpb", bpb.get("val")),
        # Per token, so that only models of one vocabulary compare: that of this checkpoint.
        _measure("perplexity", "perplexity", bpb.get("perplexity"), conditions=str(raw.get("checkpoint"))),
        _measure("text bpb", "text_bpb", text.get("bpb"), text.get("stderr"),
                 conditions=(text.get("documents"), text.get("bytes"))),
        _measure("CORE", "core", core.get("core"), core.get("stderr"),
                 conditions=(conditions.get("max_per_task"), "cropped" in conditions)),
        *(_read_task(name, entry) for name, entry in tasks.items()),
        *(_measure(f"{name}: {part.replace('_', ' ')}", "form", entry.get(part))
          for name, entry in tasks.items() for part in ("right_number", "right_form")),
        _measure("ChatCORE", "chatcore", chat.get("value"), chat.get("stderr"), conditions=chat_tasks),
        *(_measure(name, "own", value) for name, value in mapping(raw.get("own")).items()),
    ]  # fmt: skip
    measures = [measure for measure in found if measure is not None]
    if not chat:
        of_tasks = [each for each in measures if each.metric == "task"]
        errors = [each.centered_stderr for each in of_tasks]
        mean = _measure(
            "mean centred", "mean_centered", raw.get("mean_centered"),
            # The mean has an error if all its tasks have one.
            None if None in errors or not errors else math.hypot(*filter(None, errors)) / len(errors),
            conditions=frozenset(each.name for each in of_tasks),
        )  # fmt: skip
        measures += [] if mean is None else [mean]
    return Scores(
        checkpoint=str(raw.get("checkpoint") or ""),
        measures={each.name: each for each in sorted(measures, key=lambda each: METRICS.index(each.metric))},
        baselines={key: value for key in ("ngram_order2", "untrained") if (value := number(bpb.get(key))) is not None},
        core_tasks={name: task for name, entry in in_core.items() if (task := _read_task(name, entry))},
        core_conditions=conditions, chatcore_tasks=chat_tasks,
    )  # fmt: skip


def errors_of(scores: Scores) -> dict[str, float]:
    """Return metric, as recorded by steps → standard error, if known."""
    return {
        each.name if each.metric == "task" else each.metric: each.stderr
        for each in scores.measures.values()
        if each.stderr is not None
    }


def _read_task(name: str, raw: Mapping[str, Any]) -> Measure | None:
    share = raw.get("any_right")
    return _measure(
        name, "task", raw.get("accuracy"), raw.get("stderr"), chance=raw.get("chance"), kind=raw.get("kind", ""),
        num_questions=raw.get("num_questions"), shots=raw.get("num_fewshot"),
        any_right=None if share is None else (share, raw["seeds"]),
    )  # fmt: skip


def _measure(name: str, metric: str, value: object, stderr: object = None, **more: Any) -> Measure | None:
    known = number(value)
    return None if known is None else Measure(name=name, metric=metric, value=known, stderr=number(stderr), **more)


def mapping(value: object) -> dict[str, Any]:
    """Return `value` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def number(value: object) -> float | None:
    """Return `value` if it is a finite number that a float can hold (booleans are not), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= sys.float_info.max else None
