"""Evaluations during training: CORE, tasks, bits per byte of training text.

Counterparts in nanochat: CORE in base_train, accuracies and ChatCORE in chat_sft, training text in base_loss. They do
not affect weights or random numbers; after an interruption only unanswered questions are evaluated.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path

import mlx.core as mx

from mlxchat.config.schema import FinetuneConfig, PretrainConfig, TaskItem
from mlxchat.data.mixture import open_item
from mlxchat.data.packing import Row
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.evals.bpb import bits_per_byte
from mlxchat.evals.chat import Answering, evaluate_task
from mlxchat.evals.core import evaluate_core, open_bundle
from mlxchat.evals.rank_model import language_model, text_model
from mlxchat.evals.scores import Score, mean_centered
from mlxchat.model.gpt import GPT
from mlxchat.ops.machine import DECODED_ROWS
from mlxchat.planning.memory import forward_tokens
from mlxchat.runner.context import Context
from mlxchat.runner.progress import Progress
from mlxchat.tasks.base import Task
from mlxchat.training.loop import Hook


def core_hooks(
    ctx: Context, config: PretrainConfig, model: GPT, tokenizer: Tokenizer, *, also_every: int | None = None
) -> list[Hook]:
    """Return the hook that estimates CORE by the first examples of each task; none if pretrain.core is null.

    It logs core_estimate and its standard error, or for selected tasks core_tasks_estimate.
    """
    core = config.core
    if core is None:
        return []
    limits = [limit for limit in (config.core_max_per_task, core.max_per_task) if limit is not None]

    def estimate(iteration: int) -> dict[str, float]:
        work = ctx.work / "core" / str(iteration)
        result = evaluate_core(
            language_model(ctx.team, model, padding=tokenizer.bos), tokenizer, open_bundle(ctx, core),
            max_per_task=min(limits, default=None), tasks=core.tasks,
            long_prompts=core.long_prompts, batch_tokens=_tokens_at_a_time(ctx, model), work=work,
            progress=_hidden, should_stop=ctx.should_stop, stop=ctx.stop,
        )  # fmt: skip
        _forget(work)
        if result.core is None or result.stderr is None:
            centered = [score.centered for score in result.scores]
            return {"core_tasks_estimate": sum(centered) / len(centered)}
        return {"core_estimate": result.core, "core_estimate_stderr": result.stderr}

    return [Hook(run=estimate, every=config.core_every, also_every=(also_every,), title="CORE")]


def suite_hooks(ctx: Context, config: FinetuneConfig, model: GPT, tokenizer: Tokenizer) -> list[Hook]:
    """Return the hook that measures the accuracy on `suite`; none if it is empty.

    It logs accuracy_<entry>, mean_centered over all entries and, where only some are multiple choice,
    mean_centered_choice over these. Generated answers are greedy.
    """
    if not config.suite:
        return []
    rows = ctx.derived.get("sampled_rows", DECODED_ROWS)
    engine, tasks = Engine(model, tokenizer, trained=True, max_rows=rows, team=ctx.team), dict[str, Task]()
    answering = Answering(
        batch_rows=config.suite_batch_rows, max_new_tokens=config.suite_max_new_tokens,
        batch_tokens=_tokens_at_a_time(ctx, model),
    )  # fmt: skip

    def measure(iteration: int) -> dict[str, float]:
        work = ctx.work / "suite" / str(iteration)
        tasks.update(_opened(ctx, config.suite, tasks))
        scores: dict[str, Score] = {}
        for name, task in tasks.items():
            scores[name], _ = evaluate_task(
                engine, task, answering, work=work / name, should_stop=ctx.should_stop, stop=ctx.stop
            )
        _forget(work)
        choice = [score for score in scores.values() if score.kind == "categorical"]
        means = {"mean_centered": mean_centered(list(scores.values()))}
        if len(choice) < len(scores):
            means["mean_centered_choice"] = mean_centered(choice)
        accuracies = {f"accuracy_{name}": score.accuracy for name, score in scores.items()}
        return accuracies | {name: mean for name, mean in means.items() if mean is not None}

    return [Hook(run=measure, every=config.suite_every, title="the suite")]


def train_text_hooks(
    ctx: Context, config: PretrainConfig, model: GPT, tokenizer: Tokenizer, read: Callable[[int], list[Row]]
) -> list[Hook]:
    """Return the hook that measures bits per byte on the start of the training text at the end; none if that is off.

    The difference to val_bpb shows memorisation. `read` returns the first rows of the text.
    """
    count = config.train_bpb_tokens
    if count is None:
        return []

    def measure(iteration: int) -> dict[str, float]:
        rows = read(max(1, count // config.batch.row_tokens))
        micro_tokens = _tokens_at_a_time(ctx, model)
        text = text_model(ctx.team, model)
        return {"train_bpb": bits_per_byte(text, rows, tokenizer.token_bytes, micro_tokens=micro_tokens)}

    return [Hook(run=measure, every=None, title="training text")]


def _tokens_at_a_time(ctx: Context, model: GPT) -> int:
    """Return the tokens of a forward pass that needs no more memory than the training."""
    peak = ctx.derived.get("predicted_peak_bytes")
    return forward_tokens(ctx.config.machine, model.sizes, training_peak_bytes=peak)


def _opened(ctx: Context, items: Mapping[str, TaskItem], known: Mapping[str, Task]) -> dict[str, Task]:
    return {name: open_item(ctx, item) for name, item in items.items() if name not in known}


def _forget(work: Path) -> None:
    """Remove recorded answers and the memory that MLX caches for their shapes."""
    shutil.rmtree(work, ignore_errors=True)
    mx.clear_cache()


def _hidden(total: int, unit: str) -> Progress:
    """Return a progress display without output: the terminal shows the training's."""
    return Progress("", total, unit, stream=StringIO())
