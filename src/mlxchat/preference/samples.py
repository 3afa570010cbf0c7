"""Pairs of the model's own answers: a right and a wrong one to the same question, by the task's verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxchat.config.schema import PreferenceConfig
from mlxchat.data.conversation import Content, parse_answer
from mlxchat.engine.generate import Completion, Engine
from mlxchat.errors import DataError
from mlxchat.evals.core_journal import Journal
from mlxchat.rl.rollouts import draw_seed, sample
from mlxchat.runner.context import Context
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import Task

_SAMPLED_ROWS = 128
"""Answers that are sampled between two checks for a signal."""


def sample_pairs(
    ctx: Context, name: str, task: Task, engine: Engine, config: PreferenceConfig, *, seed: int
) -> list[Conversation]:
    """Return pairs of answers to a task's questions, in the questions' order; each part is saved, and sampled once.

    Raises:
        DataError: no question has a right and a wrong answer.
        Interrupted: a signal stopped the run; the same call continues.
    """
    samples = config.samples_per_question
    journal = Journal(ctx.work / "samples" / f"{name}.jsonl", {"questions": len(task)})
    with ctx.progress(len(task), f"{name} questions answered", start=len(journal.records)) as progress:
        for start in range(0, len(task), per_pass := max(1, _SAMPLED_ROWS // samples)):
            if start in journal.records:
                continue
            if ctx.should_stop():
                raise ctx.stop(f"question {start:,} of {len(task):,} to make pairs of", saved=True)
            questions = range(start, min(start + per_pass, len(task)))
            prompts = [engine.render(task[question]["messages"][:-1]) for question in questions]
            groups = sample(engine, prompts, config, samples=samples, seed=draw_seed(seed, start))
            journal.append([_compare(task, *each, engine, config) for each in zip(questions, groups, strict=True)])
            progress.update(len(journal.records))
    records = [journal.records[question] for question in range(len(task))]
    right = sum(record["right"] for record in records) / (samples * len(task))
    ctx.derive({f"{name}_questions": len(task), f"{name}_right_frac": right})
    pairs = [
        {"messages": [*task[record["index"]]["messages"][:-1], _answer(chosen)], "rejected": rejected}
        for record in records
        for chosen, rejected in record["pairs"]
    ]
    if not pairs:
        raise DataError(
            f"preference.{name}: none of {len(task):,} questions has a right and a wrong answer among its {samples} "
            f"samples ({right:.1%} of all are right). Give more preference.samples_per_question, or other questions"
        )
    return pairs


def write_pairs(path: Path, pairs: Sequence[Conversation]) -> None:
    """Write pairs as a file that task pairs reads."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            *prompt, chosen = pair["messages"]
            line = {"prompt": prompt, "chosen": [chosen], "rejected": [_answer(pair["rejected"])]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _compare(
    task: Task, question: int, completions: list[Completion], engine: Engine, config: PreferenceConfig
) -> dict[str, Any]:
    """Return how many answers to a question are right, and pairs of different right and wrong ones."""
    conversation = task[question]
    verdicts = [task.evaluate(conversation, row.text(engine.tokenizer)) for row in completions]
    found: tuple[dict[tuple[int, ...], Content], ...] = ({}, {})  # wrong and right ones, each once
    for row, verdict in zip(completions, verdicts, strict=True):
        content = parse_answer(engine.tokenizer, row.ids[:-1]) if row.finished else None
        if content is not None:
            found[verdict][tuple(row.ids)] = content
    wrong, right = (list(each.values()) for each in found)
    pairs = list(zip(right, wrong, strict=False))[: config.pairs_per_question]
    return {"index": question, "right": sum(verdicts), "pairs": pairs}


def _answer(content: Content) -> dict[str, Any]:
    return {"role": "assistant", "content": content}
