"""What is measured of a training: loss, speed and memory of each iteration, and evaluations between iterations.

The latter are CORE in pretraining (as in nanochat's base_train) and tasks afterwards (as in chat_sft). They do not
affect weights or random numbers; after an interruption only unanswered questions are evaluated.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxchat.config.schema import ConversationConfig, PretrainConfig
from mlxchat.config.wording import first_of, format_bytes, format_count
from mlxchat.data.packing import Batch, BatchSource
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import open_item
from mlxchat.engine.generate import Engine
from mlxchat.errors import StepFailed
from mlxchat.evals.core import evaluate_core
from mlxchat.evals.measure import Answering, evaluate_task
from mlxchat.evals.scores import mean_centered
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import adapters_of
from mlxchat.model.sizes import flops_per_token
from mlxchat.ops.device import backend
from mlxchat.ops.machine import DECODED_ROWS, SCORED_TOKENS
from mlxchat.optim.optimizer import Rates
from mlxchat.planning.forecast import SUITE_ANSWER_TOKENS, peak_flops
from mlxchat.runner.context import Context
from mlxchat.runner.process import Progress
from mlxchat.training.step import TrainStep

_EMA_DECAY = 0.9
_RECENT = 10  # iterations that speeds are of
_MOST_DOCUMENTS_NAMED = 8
_MOST_SKIPPED = 20  # iterations in a row without finite numbers, with training.on_nan=skip


@dataclass
class Counts:
    """What a resumed training continues with."""

    loss: float = 0.0  # exponential sum of the losses (decay 0.9, as nanochat prints it)
    loss_weight: float = 0.0  # and of their weights
    tokens: int = 0
    seconds: float = 0.0
    compiled: float = 0.0  # seconds of each start's first iteration
    waited: float = 0.0  # seconds of reading data
    skipped: int = 0  # iterations whose update was skipped
    skipped_in_a_row: int = 0


class Monitor:
    """Measures, logs and shows each iteration of a step's training."""

    def __init__(
        self, ctx: Context, step: TrainStep, batches: BatchSource, num_iterations: int, max_seconds: float | None = None
    ) -> None:
        self.ctx, self.step, self.batches = ctx, step, batches
        self.num_iterations, self.max_seconds = num_iterations, max_seconds
        self.counts = Counts()
        self._recent: list[tuple[int, float, float]] = []
        # nanochat's FLOPs per token are those of a training of all weights.
        peak = peak_flops(step.dtype) if adapters_of(step.model) is None else None
        self._mfu_per_speed = peak and flops_per_token(step.model.sizes) / (peak * step.num_ranks)
        self._before = (0.0, 0.0, 0.0)
        if backend() == "cuda" and not any(Path(kept := os.environ["MLX_PTX_CACHE_DIR"]).glob("*.ptx")):
            print(f"{ctx.step:<10} first compiles CUDA kernels, some minutes once; they are kept in {kept}")

    def expect_iterations(self, done: int) -> float:
        """Return after how many iterations the training will end, judged after `done` of them.

        These are `num_iterations`, or fewer if at the speed so far `max_seconds` pass before; `done` once they have.
        """
        if self.max_seconds is None:
            return self.num_iterations
        share = min(1.0, (self.counts.seconds - self.counts.compiled) / self.max_seconds)
        return min(self.num_iterations, done / share) if share else self.num_iterations

    def begin_iteration(self) -> None:
        """Start the clock."""
        self._before = self._clocks()

    def end_iteration(
        self, iteration: int, batch: Batch, loss: float, norm: float, rates: Rates, progress: Progress
    ) -> None:
        """Count, log and show an iteration (from 1) with its loss and the norm of its gradients.

        StepFailed: loss or norm is NaN or Inf, and `training.on_nan` ends the training.
        """
        ctx, counts = self.ctx, self.counts
        seconds, waited, communicated = (now - then for now, then in zip(self._clocks(), self._before, strict=True))
        record: dict[str, Any] = {"lr_multiplier": rates.lr_factor}
        if math.isfinite(loss) and math.isfinite(norm):
            counts.skipped_in_a_row = 0
            counts.loss = _EMA_DECAY * counts.loss + (1 - _EMA_DECAY) * loss
            counts.loss_weight = _EMA_DECAY * counts.loss_weight + (1 - _EMA_DECAY)
            ctx.metrics |= self.step.loss_parts
            record |= {"loss": loss, "grad_norm": norm, **self.step.loss_parts}
        else:
            warning = self._skip(iteration, loss, norm)
            progress.note(f"iteration {iteration}: {warning}")
            record |= {"skipped_iterations": counts.skipped, "warning": warning}
        if self.step.num_ranks > 1:
            record["communication_frac"] = communicated / seconds
        counts.tokens += batch.ids.size
        counts.seconds += seconds
        if not self._recent:
            counts.compiled += seconds
        counts.waited += waited
        self._recent = [*self._recent[1 - _RECENT :], (batch.ids.size, seconds, waited)]
        recent_tokens, recent_seconds, recent_waited = (sum(column) for column in zip(*self._recent, strict=True))
        speed = recent_tokens / recent_seconds
        record |= {
            "smooth_loss": self._smooth_loss(),
            "tokens_per_second": speed,
            "data_wait_frac": recent_waited / recent_seconds,
            "elapsed_seconds": counts.seconds,
            "peak_memory_bytes": mx.get_peak_memory(),
        }
        shown = {"loss": f"{self._smooth_loss():.3f}", "speed": f"{format_count(speed)} tok/s"}
        if self._mfu_per_speed is not None:
            record["mfu"] = self._mfu_per_speed * speed
            shown["mfu"] = f"{record['mfu']:.0%}"
        if self.max_seconds is not None:
            progress.total = round(self.expect_iterations(iteration))
            record["expected_iterations"] = progress.total
        ctx.log({"iteration": iteration, **record})
        progress.update(iteration, **shown, memory=format_bytes(mx.get_peak_memory()))

    def finish(self) -> None:
        """Write the training's totals to the step's metrics."""
        metrics, counts = self.ctx.metrics, self.counts
        if counts.skipped or self.ctx.config.training.on_nan == "skip":
            metrics["skipped_iterations"] = counts.skipped
        metrics["loss"] = self._smooth_loss()
        metrics["tokens_per_second"] = counts.tokens / max(counts.seconds, 1e-9)
        metrics["data_wait_frac"] = counts.waited / max(counts.seconds, 1e-9)

    def state(self) -> dict[str, Any]:
        """Return what a resumed training continues with, as JSON data."""
        metrics = {name: value for name, value in self.ctx.metrics.items() if math.isfinite(value)}
        return {"counts": asdict(self.counts), "metrics": metrics}

    def finished_state(self) -> dict[str, Any]:
        """Return what an extension continues with: nothing that depends on the machine's speed."""
        return {"counts": {"loss": self.counts.loss, "loss_weight": self.counts.loss_weight}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a training, finished or not."""
        self.counts = Counts(**state["counts"])

    def _smooth_loss(self) -> float:
        return self.counts.loss / self.counts.loss_weight if self.counts.loss_weight else 0.0

    def _clocks(self) -> tuple[float, float, float]:
        # Of the present, of data and of communication.
        communicated = 0.0 if self.ctx.team is None else self.ctx.team.group.seconds
        return time.perf_counter(), self.batches.waited_seconds, communicated

    def _skip(self, iteration: int, loss: float, norm: float) -> str:
        """Count a step without finite numbers, which updated nothing; return a warning, or end the training."""
        training, counts = self.ctx.config.training, self.counts
        documents = first_of(self.batches.documents(), _MOST_DOCUMENTS_NAMED)
        warning = f"loss {loss} and gradient norm {norm}, batch of {documents}"
        counts.skipped += 1
        counts.skipped_in_a_row += 1
        if training.on_nan == "stop" or counts.skipped_in_a_row > _MOST_SKIPPED:
            stopped = f"{self.ctx.step} stopped: iteration {iteration} of {self.num_iterations} gave {warning}"
            raise StepFailed(
                f"{stopped}. With training.on_nan=skip such updates are skipped and the training continues."
            )
        return f"{warning}; the update was skipped"


_CORE_EXAMPLES = 500  # of each task of CORE, as in nanochat
_ANSWERS = 32  # of the suite that are generated at a time


# Evaluations between iterations


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A measurement between iterations, such as validation. It changes neither weights nor random numbers."""

    run: Callable[[int], dict[str, float]]  # iterations done → numbers to log
    every: tuple[int | None, ...] = ()  # iterations between calls; due where any of these divides the number done
    at_start: bool = False
    at_end: bool = True
    title: str = ""  # its name on the progress line while it runs; empty: the line stays

    def is_due(self, done: int, *, ends: bool) -> bool:
        """Return whether to call it after `done` iterations, with which the training perhaps ends."""
        if done == 0 or ends:
            return self.at_end if done else self.at_start
        return any(every and done % every == 0 for every in self.every)


def observe_core(ctx: Context, config: PretrainConfig, model: GPT, tokenizer: Tokenizer) -> list[Observation]:
    """Return the estimate of CORE by the first examples of each task; nothing if pretrain.core is null.

    It logs core_estimate and its standard error, or for selected tasks core_tasks_estimate.
    """
    core = config.core
    if core is None:
        return []
    most = min(_CORE_EXAMPLES, core.max_per_task or _CORE_EXAMPLES)
    engine = _engine(ctx, model, tokenizer)

    def estimate(work: Path) -> dict[str, float]:
        result, _ = evaluate_core(ctx, engine, core, max_per_task=most, work=work, progress=_hidden)
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
    engine = _engine(ctx, model, tokenizer)
    answering = Answering(batch_rows=_ANSWERS, max_new_tokens=SUITE_ANSWER_TOKENS)
    tasks = {name: open_item(ctx, item) for name, item in config.suite.items()}

    def measure(work: Path) -> dict[str, float]:
        scores = {
            name: evaluate_task(ctx, engine, task, answering, name=name, work=work / name, progress=_hidden)[0]
            for name, task in tasks.items()
        }
        choice = [score for score in scores.values() if score.kind == "categorical"]
        means = {"mean_centered": mean_centered(list(scores.values()))}
        if len(choice) < len(scores):
            means["mean_centered_choice"] = mean_centered(choice)
        accuracies = {f"accuracy_{name}": score.accuracy for name, score in scores.items()}
        return accuracies | {name: mean for name, mean in means.items() if mean is not None}

    return [Observation(run=_resumable(ctx.work / "suite", measure), every=(config.suite_every,), title="the suite")]


def _engine(ctx: Context, model: GPT, tokenizer: Tokenizer) -> Engine:
    """Return an engine with as many tokens at a time as the training, whose peak memory is then not exceeded."""
    rows = ctx.derived.get("sampled_rows", DECODED_ROWS)
    tokens = ctx.derived.get("micro_batch_tokens", SCORED_TOKENS)
    return Engine(model, tokenizer, max_rows=rows, batch_tokens=tokens, team=ctx.team)


def _resumable(folder: Path, evaluate: Callable[[Path], dict[str, float]]) -> Callable[[int], dict[str, float]]:
    """Return a function that evaluates in a subfolder for recorded answers, which it removes if there is no error."""

    def run(iteration: int) -> dict[str, float]:
        found = evaluate(folder / str(iteration))
        shutil.rmtree(folder / str(iteration), ignore_errors=True)
        mx.clear_cache()  # of memory for the shapes of the evaluation
        return found

    return run


def _hidden(total: int, unit: str) -> Progress:
    return Progress("", total, unit, stream=StringIO())
