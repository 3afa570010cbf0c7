"""What the stages eval and outside measure, of own and of third-party models.

Chat tasks are measured as in nanochat's chat_eval: multiple choice by the letters' logits, generated answers by the
task's verdict. Answers are greedy, or sampled with several seeds. Results are journaled per batch, so a killed
evaluation resumes. Scores: `scores.py`.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.config.pins import load_part
from mlxchat.data.packing import RowStream, take_validation
from mlxchat.data.sources import Corpus
from mlxchat.data.tokens import open_documents, open_item
from mlxchat.engine.generate import Engine
from mlxchat.errors import StepFailed
from mlxchat.evals.bpb import measure_text, ngram_bits_per_byte, text_loss, texts_of_rows, uniform_bits_per_byte
from mlxchat.evals.core import measure_core, measure_plain_choice
from mlxchat.evals.examples import EXAMPLES_FILE, Example, answer_all, write_examples
from mlxchat.evals.scores import Score, chatcore, mean_centered
from mlxchat.runner.context import Context
from mlxchat.runner.process import Progress
from mlxchat.tasks.base import Task, content_text


def measure(ctx: Context, engine: Engine, *, as_base: bool, as_chat: bool) -> dict[str, Any]:
    """Return what `eval` and `suite` demand of a model as data of scores.json, write its examples, record metrics.

    `as_base` measures CORE and multiple choice as plain text, `as_chat` the suite; `corpus` is an optional input.
    """
    examples: list[dict[str, Any]] = []
    scores: dict[str, Any] = {
        "bpb": _measure_corpus(ctx, engine) if "corpus" in ctx.inputs else None,
        "core": measure_core(ctx, engine, examples) if as_base else None,
        **_measure_suite(ctx, engine, examples, as_chat=as_chat),
        "pass_at_k": None,
    }
    if as_base and ctx.config.eval.base_tasks:
        scores["tasks"] |= measure_plain_choice(ctx, engine, examples)
    if ctx.config.eval.text is not None:
        scores["text"] = measure_text(ctx, engine)
    write_examples(ctx.out / EXAMPLES_FILE, examples)
    return scores


def write_scores(ctx: Context, scores: dict[str, Any]) -> None:
    """Write scores.json."""
    (ctx.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def measure_own(engine: Engine, functions: Mapping[str, str]) -> dict[str, float]:
    """Return name → the finite number that the user's function `module:name` of `eval.own` returns for a model."""
    found = {}
    for name, function in sorted(functions.items()):
        value = load_part(function)(engine)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise StepFailed(f"eval.own.{name}: {function} returned {value!r}, expected a finite number")
        found[name] = float(value)
    return found


def _measure_corpus(ctx: Context, engine: Engine) -> dict[str, float]:
    """Return how well the validation text, in rows of the model's own tokens, is predicted, also by baselines."""
    documents = open_documents(ctx, "validation", engine.tokenizer, once=True)
    stream = RowStream("best_fit", documents, row_tokens=engine.context_tokens, buffer_size=1000)
    rows = take_validation(stream, ctx.config.eval.bpb_tokens, "eval.bpb_tokens")
    loss = text_loss(
        engine.model, rows, engine.tokenizer.token_bytes, micro_tokens=engine.batch_tokens, team=engine.team
    )
    found = {"val": loss.bits_per_byte, "perplexity": loss.perplexity, "tokens": loss.num_tokens}
    ctx.metrics |= {"val_bpb": loss.bits_per_byte, "perplexity": loss.perplexity}
    if engine.is_ours:  # others have other rows, so other baselines
        training = Corpus.open(ctx.inputs["corpus"]).documents("train")
        found["ngram_order2"] = ngram_bits_per_byte(training, texts_of_rows(rows, engine.tokenizer))
        found["untrained"] = uniform_bits_per_byte(rows, engine.tokenizer.token_bytes)
        ctx.metrics |= {"ngram_bpb": found["ngram_order2"], "untrained_bpb": found["untrained"]}
    return found


def _measure_suite(ctx: Context, engine: Engine, examples: list[dict[str, Any]], *, as_chat: bool) -> dict[str, Any]:
    """Return the scores of the suite and their means, also as metrics; third-party models answer greedily, once."""
    config, results, suite = ctx.config.eval, dict[str, Score](), sorted(ctx.config.suite.items())
    seeds = config.seeds if engine.is_ours else 1
    temperature = float(seeds > 1) if config.temperature is None or not engine.is_ours else config.temperature
    # All at first, so that a task that cannot be judged on this machine ends the step before any answer.
    tasks = {name: open_item(ctx, item) for name, item in suite} if as_chat else {}
    for name, task in tasks.items():
        answering = Answering(
            batch_rows=config.batch_rows, max_new_tokens=config.max_new_tokens, seeds=seeds, temperature=temperature,
            top_k=config.top_k if engine.is_ours else None, seed=ctx.seed(f"answers/{name}"),
        )  # fmt: skip
        results[name], rows = evaluate_task(ctx, engine, task, answering, name=name, work=ctx.work / "tasks" / name)
        examples += [{"task": name, **row} for row in rows]
        ctx.metrics[name] = results[name].accuracy
    mean = mean_centered(list(results.values()))
    whole = chatcore(results, {name: item.task for name, item in suite if item.split == "test"})
    measured = {"mean_centered": mean, "chatcore": None if whole is None else whole["value"]}
    ctx.metrics |= {name: value for name, value in measured.items() if value is not None}
    return {
        "tasks": {name: score.to_dict() for name, score in results.items()}, "mean_centered": mean, "chatcore": whole,
    }  # fmt: skip


_Answer = tuple[str, int, dict[str, Any]]  # text, tokens and details


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
        prompts, letters = [self.prompts[index] for index in batch], [talk["letters"] for talk in talks]
        logits = self.engine.letter_logits(prompts, letters)
        return [
            (offered[int(np.argmax(row))], len(prompt), {"logits": dict(zip(offered, row, strict=True))})
            for prompt, offered, row in zip(prompts, letters, logits, strict=True)
        ]

    def _texts(self, batch: list[int], sample: int) -> list[_Answer]:
        how = self.answering
        settings: dict[str, Any] = {
            "max_new_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "top_k": how.top_k,
        }
        seeds = [_seed_of(how.seed, index, sample) for index in batch]
        completions = self.engine.complete([self.prompts[index] for index in batch], seed=seeds, **settings)
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
