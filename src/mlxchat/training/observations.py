"""Evaluations during training: CORE in pretraining (as in nanochat's base_train), tasks afterwards (as in chat_sft).

They do not affect weights or random numbers; after an interruption only unanswered questions are evaluated.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import mlx.core as mx

from mlxchat.config.schema import ConversationConfig, PretrainConfig
from mlxchat.data.mixture import open_item
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.evals.chat import Answering, evaluate_task
from mlxchat.evals.core import evaluate_core
from mlxchat.evals.language_model import LanguageModel
from mlxchat.evals.scores import mean_centered
from mlxchat.model.gpt import GPT
from mlxchat.ops.machine import DECODED_ROWS
from mlxchat.runner.context import Context
from mlxchat.runner.progress import Progress
from mlxchat.training.forecast import SUITE_ANSWER_TOKENS
from mlxchat.training.loop import Observation

_CORE_EXAMPLES = 500  # of each task of CORE, as in nanochat
_ANSWERS = 32  # of the suite that are generated at a time


def observe_core(ctx: Context, config: PretrainConfig, model: GPT, tokenizer: Tokenizer) -> list[Observation]:
    """Return the estimate of CORE by the first examples of each task; nothing if pretrain.core is null.

    It logs core_estimate and its standard error, or for selected tasks core_tasks_estimate.
    """
    core = config.core
    if core is None:
        return []
    most = min(_CORE_EXAMPLES, core.max_per_task or _CORE_EXAMPLES)

    def estimate(work: Path) -> dict[str, float]:
        asked = _scoring(ctx, Engine(model, tokenizer, team=ctx.team))
        result, _ = evaluate_core(ctx, asked, core, max_per_task=most, work=work, progress=_hidden)
        if result["core"] is None:
            centered = [task["centered"] for task in result["tasks"].values()]
            return {"core_tasks_estimate": sum(centered) / len(centered)}
        return {"core_estimate": result["core"], "core_estimate_stderr": result["stderr"]}

    return [Observation(run=_resumable(ctx.work / "core", estimate), every=(config.core_every,), title="CORE")]


def observe_suite(ctx: Context, config: ConversationConfig, model: GPT, tokenizer: Tokenizer) -> list[Observation]:
    """Return the measurement of accuracies on `suite`; nothing if it is empty.

    It logs accuracy_<entry>, mean_centered over all entries and, where only some are multiple choice,
    mean_centered_choice over these. Generated answers are greedy.
    """
    if not config.suite:
        return []
    rows = ctx.derived.get("sampled_rows", DECODED_ROWS)
    engine = Engine(model, tokenizer, max_rows=rows, team=ctx.team)
    answering = Answering(batch_rows=_ANSWERS, max_new_tokens=SUITE_ANSWER_TOKENS)
    tasks = {name: open_item(ctx, item) for name, item in config.suite.items()}

    def measure(work: Path) -> dict[str, float]:
        asked = _scoring(ctx, engine)
        scores = {
            name: evaluate_task(ctx, asked, task, answering, name=name, work=work / name, progress=_hidden)[0]
            for name, task in tasks.items()
        }
        choice = [score for score in scores.values() if score.kind == "categorical"]
        means = {"mean_centered": mean_centered(list(scores.values()))}
        if len(choice) < len(scores):
            means["mean_centered_choice"] = mean_centered(choice)
        accuracies = {f"accuracy_{name}": score.accuracy for name, score in scores.items()}
        return accuracies | {name: mean for name, mean in means.items() if mean is not None}

    return [Observation(run=_resumable(ctx.work / "suite", measure), every=(config.suite_every,), title="the suite")]


def _scoring(ctx: Context, engine: Engine) -> LanguageModel:
    """Return the model with as many tokens at a time as the training's, whose peak is then not exceeded."""
    return LanguageModel(engine, batch_tokens=ctx.derived.get("micro_batch_tokens"))


def _resumable(folder: Path, evaluate: Callable[[Path], dict[str, float]]) -> Callable[[int], dict[str, float]]:
    """Return a function that evaluates in a subfolder for recorded answers, which it removes if there is no error."""

    def run(iteration: int) -> dict[str, float]:
        found = evaluate(folder / str(iteration))
        shutil.rmtree(folder / str(iteration), ignore_errors=True)
        mx.clear_cache()  # of memory for the shapes of the evaluation
        return found

    return run


def _hidden(total: int, unit: str) -> Progress:
    """Return a progress display without output: the terminal shows the training's."""
    return Progress("", total, unit, stream=StringIO())
