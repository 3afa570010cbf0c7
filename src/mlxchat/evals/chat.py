"""Chat tasks: multiple choice by the letters' logits, generated answers by the task's own verdict.

Counterpart of nanochat's chat_eval. A score is shown against its chance level: centred = (accuracy − chance) /
(1 − chance), and the mean of the centred scores is ChatCORE's formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.data.conversation import render_for_completion
from mlxchat.engine.generate import Engine
from mlxchat.errors import DataError
from mlxchat.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of one task."""

    kind: str
    accuracy: float
    chance: float
    num_examples: int

    @property
    def centered(self) -> float:
        """Accuracy rescaled: 0 is chance, 1 is perfect."""
        return (self.accuracy - self.chance) / (1 - self.chance)

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / max(1, self.num_examples))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for scores.json."""
        return {
            "kind": self.kind, "accuracy": self.accuracy, "chance": self.chance, "centered": self.centered,
            "num_examples": self.num_examples, "stderr": self.stderr,
        }  # fmt: skip


def evaluate_task(
    engine: Engine,
    task: Task,
    *,
    batch_rows: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[Score, list[dict[str, Any]]]:
    """Return the score of greedy answers to all of a task's conversations, and a record of each.

    Args:
        engine: the model.
        task: held-out conversations with a verdict.
        batch_rows: conversations answered at a time.
        max_new_tokens: of a generated answer.
        on_progress: called with the number of conversations answered.
    """
    answer = _choose_letters if task.kind == "categorical" else _generate_answers
    records: list[dict[str, Any]] = []
    # Prompts of similar length share a batch, so that little of it is padding.
    prompts = [render_for_completion(engine.tokenizer, task[index]) for index in range(len(task))]
    order = sorted(range(len(task)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_rows):
        indices = order[start : start + batch_rows]
        conversations = [task[index] for index in indices]
        answers = answer(engine, [prompts[index] for index in indices], conversations, max_new_tokens)
        for index, conversation, text in zip(indices, conversations, answers, strict=True):
            correct = task.evaluate(conversation, text)
            question = conversation["messages"][-2]["content"]
            records.append({"index": index, "question": question, "answer": text, "correct": bool(correct)})
        on_progress(len(records))
    records.sort(key=lambda record: record["index"])
    accuracy = float(np.mean([record["correct"] for record in records])) if records else 0.0
    return Score(kind=task.kind, accuracy=accuracy, chance=task.chance, num_examples=len(records)), records


def mean_centered(scores: list[Score]) -> float | None:
    """Return the mean of the centred scores (ChatCORE's formula), or None without scores."""
    return float(np.mean([score.centered for score in scores])) if scores else None


def _choose_letters(
    engine: Engine, prompts: list[list[int]], conversations: list[dict[str, Any]], max_new_tokens: int
) -> list[str]:
    """Return for each prompt the letter with the highest logit after it, among those that are offered."""
    longest = max(len(prompt) for prompt in prompts)
    # Padded on the right: a causal model's state at the last prompt token does not depend on what follows.
    ids = mx.array([prompt + [engine.tokenizer.bos] * (longest - len(prompt)) for prompt in prompts])
    hidden = engine.model.hidden(ids)
    last = hidden[mx.arange(len(prompts)), mx.array([len(prompt) - 1 for prompt in prompts])]
    logits = np.asarray((last @ engine.model.head_weight.T).astype(mx.float32))
    answers = []
    for row, conversation in zip(logits, conversations, strict=True):
        letters = conversation["letters"]
        tokens = [engine.tokenizer.encode(letter) for letter in letters]
        if any(len(token) != 1 for token in tokens):
            raise DataError(f"the letters {letters} must be single tokens of this tokenizer")
        answers.append(letters[int(np.argmax([row[token[0]] for token in tokens]))])
    return answers


def _generate_answers(
    engine: Engine, prompts: list[list[int]], conversations: list[dict[str, Any]], max_new_tokens: int
) -> list[str]:
    """Return the greedy answer to each prompt."""
    completions = engine.complete(prompts, max_new_tokens=max_new_tokens)
    return [completion.text(engine.tokenizer) for completion in completions]
