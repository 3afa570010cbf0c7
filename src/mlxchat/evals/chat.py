"""Chat tasks: multiple choice by the letters' logits, generated answers by the task's verdict.

Counterpart of nanochat's chat_eval. Answers are greedy, or sampled with several seeds. Results are
journaled per batch, so a killed evaluation resumes. Scores: `scores.py`.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.engine.generate import Engine
from mlxchat.evals.examples import Example, answer_all
from mlxchat.evals.scores import Score
from mlxchat.runner.context import Context
from mlxchat.runner.progress import Progress
from mlxchat.tasks.base import Task, content_text

_Answer = tuple[str, int, dict[str, Any]]
"""Text, tokens and details."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Generation and batching of answers."""

    batch_rows: int  # answers that a process generates at a time
    max_new_tokens: int  # longest generated answer
    seeds: int = 1  # samples per generated answer; multiple choice is deterministic and computed once
    temperature: float = 0.0  # 0 is greedy
    top_k: int | None = None  # sample from the k most likely tokens; None: all
    seed: int = 0  # seed of the sampling; an answer depends only on it, the question's index and the sample's


def evaluate_task(
    ctx: Context, engine: Engine, task: Task, answering: Answering, *, name: str, work: Path,
    progress: Callable[[int, str], Progress] | None = None,
) -> tuple[Score, list[Example]]:  # fmt: skip
    """Return the score and the records of all answers; `work` keeps the journals, `progress` is as in `answer_all`."""
    asked = _Asked(engine, task, answering)
    samples = answering.seeds if task.kind == "generative" else 1
    about = {"questions": len(task), "kind": task.kind, **asdict(answering), "batch_rows": None, "seeds": None}
    passes: list[list[Example]] = []
    # Slow verdicts, such as running programs, are found together.
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="verdicts") as pool:
        for sample in range(samples):
            unit = f"questions of {name}" + (f" ({sample + 1}/{samples})" if samples > 1 else "")
            journal, answer = work / f"{sample}.jsonl", partial(asked.answer, sample, pool)
            passes.append(answer_all(ctx, journal, {**about, "sample": sample}, len(task), unit, answer, progress))
            mx.clear_cache()  # of shapes that occur only in this task
    score = Score.of_examples(passes, kind=task.kind, chance=task.chance, cropped=sum(asked.cropped))
    return score, [example for each in passes for example in each]


class _Asked:
    """A task's questions as prompts, in batches that do not depend on earlier answers."""

    def __init__(self, engine: Engine, task: Task, answering: Answering) -> None:
        self.engine, self.task, self.answering = engine, task, answering
        most = engine.context_tokens
        rendered = [engine.render(task[index]["messages"][:-1]) for index in range(len(task))]
        # Long prompts keep their end, which has the question.
        self.prompts = [ids if len(ids) <= most else [ids[0], *ids[1 - most :]] for ids in rendered]
        self.cropped = [len(ids) > most for ids in rendered]

    def answer(self, sample: int, pool: ThreadPoolExecutor, known: dict[int, Example]) -> Iterator[list[Example]]:
        """Yield the examples of each batch that is not completely known."""
        draws = self.task.kind == "generative" and self.answering.temperature > 0
        for batch in self._batches():
            if all(index in known for index in batch):
                continue
            talks = [self.task[index] for index in batch]
            answers = self._letters(batch, talks) if self.task.kind == "categorical" else self._texts(batch, sample)
            verdicts = pool.map(self.task.explain, talks, [text for text, _, _ in answers])
            yield [
                {
                    "index": index, "seed": sample if draws else None, "prompt": question_text(talk), "output": text,
                    "expected": content_text(talk["messages"][-1]["content"]), "verdict": is_right, "tokens": tokens,
                    "details": details | ({"cropped": True} if self.cropped[index] else {}) | more,
                }
                for index, talk, (text, tokens, details), (is_right, more)
                in zip(batch, talks, answers, verdicts, strict=True)
            ]  # fmt: skip

    def _batches(self) -> list[list[int]]:
        """Return the questions' indices in batches of similar length, to save padding."""
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompts[index]))
        team = self.engine.team
        rows = self.answering.batch_rows * (1 if team is None else team.size)
        if self.task.kind == "categorical":
            rows = max(1, self.engine.batch_tokens // max(map(len, self.prompts), default=1))
        return [order[start : start + rows] for start in range(0, len(order), rows)]

    def _letters(self, batch: list[int], talks: list[dict[str, Any]]) -> list[_Answer]:
        """Return the letter with the highest logit after each question."""
        prompts, letters = [self.prompts[index] for index in batch], [talk["letters"] for talk in talks]
        logits = self.engine.letter_logits(prompts, letters)
        return [
            (offered[int(np.argmax(row))], len(prompt), {"logits": dict(zip(offered, row, strict=True))})
            for prompt, offered, row in zip(prompts, letters, logits, strict=True)
        ]

    def _texts(self, batch: list[int], sample: int) -> list[_Answer]:
        """Return the generated answer to each question."""
        how = self.answering
        completions = self.engine.complete(
            [self.prompts[index] for index in batch],
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_k=how.top_k,
            seed=[_seed_of(how.seed, index, sample) for index in batch],
        )
        return [(each.text(self.engine.tokenizer), len(each.ids), {"finished": each.finished}) for each in completions]


def question_text(conversation: dict[str, Any]) -> str:
    """Return the messages before the answer as text."""
    messages = conversation["messages"][:-1]
    if len(messages) == 1:
        return content_text(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {content_text(message['content'])}" for message in messages)


def _seed_of(seed: int, index: int, sample: int) -> int:
    """Return the seed of one answer, in [0, 2^32)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{sample}".encode()).digest()[:4], "big")
