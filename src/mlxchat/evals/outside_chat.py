"""Chat tasks for models of other makes: their own chat template, their own tokens, our tasks' verdicts.

Multiple choice by the letters' logits, free text generated greedily by mlx-lm. Such a model has no calculator to call.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.errors import DataError
from mlxchat.evals.chat import expected_text, judge, question_text
from mlxchat.evals.chat_scores import Score
from mlxchat.evals.core_journal import Journal
from mlxchat.evals.outside import OutsideModel, OutsideTokenizer
from mlxchat.tasks.base import Task


def evaluate_outside_task(
    model: OutsideModel,
    tokenizer: OutsideTokenizer,
    task: Task,
    *,
    name: str,
    batch_rows: int,
    max_new_tokens: int,
    work: Path,
    on_progress: Callable[[int], None],
    check: Callable[[], None] = lambda: None,
) -> tuple[Score, list[dict[str, Any]]]:
    """Return the score of greedy answers to all of a task's conversations, and a row of examples.parquet for each.

    Args:
        model: to evaluate.
        tokenizer: with a chat template.
        task: held-out conversations with a verdict.
        name: what the task is called.
        batch_rows: conversations answered at a time.
        max_new_tokens: of a generated answer.
        work: folder of the journal.
        on_progress: called with the number of conversations answered.
        check: called between batches; it may raise, and the same call continues.
    """
    journal = Journal(work / f"{name}.jsonl", {"max_new_tokens": max_new_tokens, "questions": len(task)})
    prompts = [tokenizer.render_prompt(_messages(task[index])) for index in range(len(task))]
    order = sorted(range(len(task)), key=lambda index: (len(prompts[index]), index))
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        if all(index in journal.records for index in batch):
            continue
        asked = [prompts[index] for index in batch]
        conversations = [task[index] for index in batch]
        if task.kind == "categorical":
            answers = _letters(model, tokenizer, asked, [each["letters"] for each in conversations])
        else:
            answers = _generated(model, tokenizer, asked, max_new_tokens)
        found = []
        for index, conversation, answer in zip(batch, conversations, answers, strict=True):
            verdict, details = judge(task, conversation, answer)
            found.append(
                {
                    "index": index, "seed": None, "prompt": question_text(conversation), "output": answer,
                    "expected": expected_text(conversation), "verdict": verdict, "tokens": len(prompts[index]),
                    "details": details,
                }
            )  # fmt: skip
        journal.append(found)
        on_progress(len(journal.records))
        check()
    records = [journal.records[index] for index in range(len(task))]
    score = Score.of_examples([records], kind=task.kind, chance=task.chance)
    return score, [{"task": name, **record} for record in records]


def _messages(conversation: dict[str, Any]) -> list[dict[str, str]]:
    """Return what comes before the answer, as plain text."""
    return [
        {
            "role": message["role"],
            "content": message["content"]
            if isinstance(message["content"], str)
            else "".join(part["text"] for part in message["content"]),
        }
        for message in conversation["messages"][:-1]
    ]


def _letters(
    model: OutsideModel, tokenizer: OutsideTokenizer, prompts: list[list[int]], letters: list[list[str]]
) -> list[str]:
    """Return for each prompt the letter with the highest logit after it, among those that are offered."""
    answers = []
    for logits, offered in zip(model.next_logits(prompts), letters, strict=True):
        ids = [tokenizer.encode(letter)[-1] for letter in offered]
        if len(set(ids)) < len(ids):
            raise DataError(f"the letters {offered} do not end in different tokens of this tokenizer")
        answers.append(offered[int(np.argmax(logits[ids]))])
    return answers


def _generated(
    model: OutsideModel, tokenizer: OutsideTokenizer, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    from mlx_lm.generate import batch_generate

    return [
        str(text) for text in batch_generate(model.model, tokenizer.wrapper, prompts, max_tokens=max_new_tokens).texts
    ]
