"""Chat tasks: multiple choice by the letters' logits, generated answers by the task's verdict.

Counterpart of nanochat's chat_eval. Answers are greedy, or sampled with several seeds. Results are
journaled per batch, so a killed evaluation resumes. Scores: `scores.py`.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.engine.generate import Engine, clear_caches
from mlxchat.engine.third_party import ThirdPartyEngine
from mlxchat.errors import DataError, Interrupted
from mlxchat.evals.core_journal import Journal
from mlxchat.evals.rank_model import language_model
from mlxchat.evals.scores import Score
from mlxchat.evals.third_party import ThirdPartyModel
from mlxchat.tasks.answers import content_text
from mlxchat.tasks.base import Task

Example = dict[str, Any]
"""One row of examples.parquet, without its task."""
_Verdict = tuple[bool, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Generation and batching of answers."""

    batch_rows: int
    """Answers that a process generates at a time."""
    max_new_tokens: int
    """Longest generated answer."""
    batch_tokens: int = 16384
    """Tokens per forward pass of multiple-choice questions."""
    seeds: int = 1
    """Samples per generated answer; multiple choice is deterministic and computed once."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Sample from the k most likely tokens; None: all."""
    seed: int = 0
    """Seed of the sampling; an answer depends only on it, the question's index and the sample's."""

    def about(self) -> dict[str, Any]:
        """Return the settings that answers depend on, for the journals."""
        names = ("max_new_tokens", "temperature", "top_k", "seed")
        return {name: getattr(self, name) for name in names}


def evaluate_task(
    engine: Engine | ThirdPartyEngine,
    task: Task,
    answering: Answering,
    *,
    work: Path | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
    stop: Callable[[str], Exception] | None = None,
) -> tuple[Score, list[Example]]:
    """Return the score of a model's answers to all of a task's conversations, and a record of each answer.

    Args:
        engine: the model.
        task: held-out conversations with a verdict.
        answering: generation and batching.
        work: folder for this task's journals, kept between attempts; None: no journals.
        on_progress: called with the number of judged answers over all seeds.
        should_stop: called between batches.
        stop: maps a position to the exception to raise; None: `Interrupted`.

    Raises:
        DataError: a letter is not a single token.
        Interrupted: `should_stop` returned True; the same call resumes.
    """
    asked = _Asked(engine, task, answering)
    samples = answering.seeds if task.kind == "generative" else 1
    about = {"questions": len(task), "kind": task.kind, **answering.about()}
    passes: list[list[Example]] = []
    before = 0
    # Slow verdicts, such as running programs, overlap with the next batch.
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="verdicts") as pool:
        for sample in range(samples):
            journal = Journal(work and work / f"{sample}.jsonl", {**about, "sample": sample})
            on_progress(before + len(journal.records))
            for examples in asked.answer(sample, journal.records, pool):
                journal.append(examples)
                done = before + len(journal.records)
                on_progress(done)
                if should_stop():
                    where = f"answer {done} of {samples * len(task)}"
                    raise stop(where) if stop else Interrupted(f"stopped at {where}", signal.SIGTERM)
            clear_caches(engine.team)  # of shapes that occur only in this task
            passes.append([journal.records[index] for index in range(len(task))])
            before += len(task)
    score = Score.of_examples(passes, kind=task.kind, chance=task.chance, cropped=sum(asked.cropped))
    return score, [example for each in passes for example in each]


class _Asked:
    """A task's questions as prompts, in batches that do not depend on earlier answers."""

    def __init__(self, engine: Engine | ThirdPartyEngine, task: Task, answering: Answering) -> None:
        self.engine, self.task, self.answering = engine, task, answering
        most = engine.context_tokens
        rendered = [engine.render(task[index]["messages"][:-1]) for index in range(len(task))]
        # Long prompts keep their end, which has the question.
        self.prompts = [ids if len(ids) <= most else [ids[0], *ids[1 - most :]] for ids in rendered]
        self.cropped = [len(ids) > most for ids in rendered]

    def answer(self, sample: int, known: dict[int, Example], pool: ThreadPoolExecutor) -> Iterator[list[Example]]:
        """Yield the examples of each batch that is not completely known."""
        draws = self.task.kind == "generative" and self.answering.temperature > 0
        find = self._choose_letters if self.task.kind == "categorical" else self._generate
        waiting: tuple[list[Example], list[Future[_Verdict]]] | None = None
        for batch in self._batches():
            if all(index in known for index in batch):
                continue
            conversations = [self.task[index] for index in batch]
            found = find(batch, conversations, sample)
            examples, verdicts = [], []
            for index, conversation, (text, tokens, details) in zip(batch, conversations, found, strict=True):
                verdicts.append(pool.submit(judge, self.task, conversation, text))
                details |= {"cropped": True} if self.cropped[index] else {}
                examples.append(
                    {
                        "index": index, "seed": sample if draws else None,
                        "prompt": question_text(conversation), "output": text, "expected": expected_text(conversation),
                        "verdict": None, "tokens": tokens, "details": details,
                    }
                )  # fmt: skip
            if waiting is not None:
                yield _with_verdicts(*waiting)
            waiting = examples, verdicts
        if waiting is not None:
            yield _with_verdicts(*waiting)

    def _batches(self) -> list[list[int]]:
        """Return the questions' indices in batches of similar length, to save padding."""
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompts[index]))
        if self.task.kind != "categorical":
            team = self.engine.team
            rows = self.answering.batch_rows * (1 if team is None else team.size)
            return [order[start : start + rows] for start in range(0, len(order), rows)]
        batches: list[list[int]] = []
        for index in order:  # ascending, so the others are padded to this length
            if not batches or (len(batches[-1]) + 1) * len(self.prompts[index]) > self.answering.batch_tokens:
                batches.append([])
            batches[-1].append(index)
        return batches

    def _choose_letters(
        self, batch: list[int], conversations: list[dict[str, Any]], sample: int
    ) -> list[tuple[str, int, dict[str, Any]]]:
        """Return each question's letter with the highest logit, tokens and details."""
        prompts = [self.prompts[index] for index in batch]
        letters = [conversation["letters"] for conversation in conversations]
        logits = letter_logits(self.engine, prompts, letters)
        return [
            (offered[int(np.argmax(row))], len(prompt), {"logits": dict(zip(offered, row, strict=True))})
            for prompt, offered, row in zip(prompts, letters, logits, strict=True)
        ]

    def _generate(
        self, batch: list[int], conversations: list[dict[str, Any]], sample: int
    ) -> list[tuple[str, int, dict[str, Any]]]:
        """Return each question's answer, tokens and details."""
        how = self.answering
        completions = self.engine.complete(
            [self.prompts[index] for index in batch],
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_k=how.top_k,
            seed=[_seed_of(how.seed, index, sample) for index in batch],
        )
        return [(each.text(self.engine.tokenizer), len(each.ids), {"finished": each.finished}) for each in completions]


def letter_logits(
    engine: Engine | ThirdPartyEngine, prompts: list[list[int]], letters: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Return the logits of each prompt's letters as its next token.

    Raises:
        DataError: a letter is not a single token, or two letters of a third-party model end in the same token.
    """
    tokens = [[engine.tokenizer.encode(letter) for letter in offered] for offered in letters]
    for offered, encoded in zip(letters, tokens, strict=True):
        if isinstance(engine, Engine) and any(len(token) != 1 for token in encoded):
            raise DataError(f"the letters {list(offered)} must be single tokens of this tokenizer")
        if len({token[-1] for token in encoded}) < len(encoded):  # SentencePiece may add a leading token for the space
            raise DataError(f"the letters {list(offered)} do not end in different tokens of this tokenizer")
    if isinstance(engine, Engine):
        find = language_model(engine.team, engine.model, padding=engine.tokenizer.bos).logits_of
    else:
        find = ThirdPartyModel(engine.model, engine.context_tokens).logits_of
    return find(prompts, [[token[-1] for token in encoded] for encoded in tokens])


def question_text(conversation: dict[str, Any]) -> str:
    """Return the messages before the answer as text."""
    messages = conversation["messages"][:-1]
    if len(messages) == 1:
        return content_text(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {content_text(message['content'])}" for message in messages)


def expected_text(conversation: dict[str, Any]) -> str:
    """Return the expected answer."""
    return content_text(conversation["messages"][-1]["content"])


def judge(task: Task, conversation: dict[str, Any], text: str) -> _Verdict:
    """Return a task's verdict and its details."""
    explain: Callable[[dict[str, Any], str], _Verdict] | None = getattr(task, "explain", None)
    if explain is not None:
        return explain(conversation, text)
    return bool(task.evaluate(conversation, text)), {}


def _with_verdicts(examples: list[Example], verdicts: list[Future[_Verdict]]) -> list[Example]:
    for example, verdict in zip(examples, verdicts, strict=True):
        example["verdict"], more = verdict.result()
        example["details"] |= more
    return examples


def _seed_of(seed: int, index: int, sample: int) -> int:
    """Return the seed of one answer, in [0, 2^32)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{sample}".encode()).digest()[:4], "big")
