"""What a small training needs: an optimizer, numbered batches, a schedule, a stage's context; and the training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from kit.models import VOCABULARY, composed, make_model, make_tokenizer
from mlxchat.config.schema import OptimizerConfig, RLConfig, ScheduleConfig
from mlxchat.data.packing import Batch, Row, mean_batch
from mlxchat.engine.generate import Completion
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters
from mlxchat.optim.optimizer import Optimizer, Rates
from mlxchat.rl.rollouts import Group, Rollout
from mlxchat.runner.context import Context
from mlxchat.training.loop import fit
from mlxchat.training.monitor import Observation
from mlxchat.training.step import make_step


def optimizer_config(option: str = "muon_oct2025", **changes: Any) -> OptimizerConfig:
    """Return conf/optimizer/<option>.yaml, with changes."""
    return replace(composed("experiment=speedrun_d12", f"optimizer={option}").optimizer, **changes)


def make_optimizer(model: GPT, option: str = "muon_oct2025", **changes: Any) -> Optimizer:
    """Return the optimizer of such a configuration."""
    return Optimizer(model, optimizer_config(option, **changes), width=model.sizes.width)


def move(optimizer: Optimizer, model: GPT, gradients: dict[str, Any], rates: Rates) -> dict[str, np.ndarray]:
    """Update a model's parameters; return them."""
    optimizer.update(model, {name: mx.array(value) for name, value in gradients.items()}, rates)
    return {name: np.asarray(value) for name, value in flatten_parameters(model).items()}


def schedule(**changes: Any) -> ScheduleConfig:
    """Return a schedule of constant rates, with changes."""
    constant = {"init_lr_frac": 1.0, "warmup_frac": 0.0, "warmdown_frac": 0.0, "final_lr_frac": 0.0}
    return ScheduleConfig(**{**constant, "weight_decay_frac": 1.0, **changes})


def make_rows(count: int = 3, *, seed: int = 0, tokens: int = 16) -> list[Row]:
    """Return rows of random ids with the next ones as targets."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (count, tokens + 1)).astype(np.int32)
    return [(row[:-1], row[1:]) for row in ids]


class NumberedBatches:
    """Batches that follow from their number; `uneven`: rows differ in targets, `broken`: they have a weight `value`."""

    waited_seconds = 0.0

    def __init__(
        self, *, rows: int = 3, uneven: bool = False, broken: set[int] = frozenset(), value: float = float("nan")
    ) -> None:  # fmt: skip
        self.number = 0
        self.rows, self.uneven, self.broken, self.value = rows, uneven, broken, value

    def next_batch(self, iteration: int) -> Batch:
        rows = make_rows(self.rows, seed=self.number)
        if self.uneven:
            counts = np.random.default_rng(self.number).integers(0, 17, self.rows)
            rows = [
                (ids, np.where(np.arange(16) < count, targets, -1).astype(np.int32))
                for (ids, targets), count in zip(rows, counts, strict=True)
            ]
        batch = mean_batch(rows)
        if self.number in self.broken:
            batch.weights[0, 0] = self.value
        self.number += 1
        return batch

    def prepare(self) -> None:
        pass

    def documents(self) -> list[str]:
        return [f"book {self.number - 1}", "page 7"]

    def state(self) -> dict[str, Any]:
        return {"number": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def make_context(
    folder: Path, *, stop_signal: Callable[[], int | None] = lambda: None, training: dict[str, Any] | None = None,
    team: Any = None, **machine: Any,
) -> Context:  # fmt: skip
    """Return a stage's context with its work and its outputs in a folder, where a second attempt continues a first."""
    config = composed("machine=cpu")
    defaults = {"device_batch_tokens": 64, "checkpoint_seconds": 1e9, "blas_threads": 1}
    settings: Any = SimpleNamespace(
        machine=replace(config.machine, **{**defaults, **machine}), training=replace(config.training, **training or {})
    )
    work, out = folder / "work", folder / "out"
    for place in (work, out):
        place.mkdir(parents=True, exist_ok=True)
    return Context(
        step="toy", stage="toy", config=settings, inputs={}, out=out, work=work, root_seed=0,
        stop_signal=stop_signal, on_metrics=lambda step, record: None, team=team,
    )  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A training that has ended."""

    ctx: Context
    bits: dict[str, bytes]
    """Weights and moments."""

    def curve(self, name: str) -> dict[int, Any]:
        """Return a number of metrics.jsonl by iteration."""
        records = self.ctx.records("metrics").read()
        return {record["iteration"]: record[name] for record in records if name in record}


def bits(model: GPT, optimizer: Optimizer | None = None) -> dict[str, bytes]:
    """Return the bytes of all weights and, with an optimizer, of its moments."""
    arrays = flatten_parameters(model) | ({} if optimizer is None else optimizer.state)
    return {name: np.array(value).tobytes() for name, value in arrays.items()}


def train(
    folder: Path,
    num_iterations: int = 6,
    *,
    observations: Sequence[Observation] | Callable[[Context, GPT], list[Observation]] = (),
    stop_after: int | None = None,
    model: GPT | None = None,
    optimizer: Optimizer | None = None,
    batches: Any = None,
    context: dict[str, Any] | None = None,
    extends: Path | None = None,
    keep_state: bool = False,
    rates: ScheduleConfig | None = None,
    dropout: float = 0.0,
    distillation: Any = None,
    micro_tokens: int = 64,
    **options: Any,
) -> Trained:
    """Train a small model, from where an earlier attempt in this folder stopped.

    A signal arrives during iteration `stop_after`. `context` is for make_context, `options` for fit, `rates` the
    schedule. With keep_state the context's `out` gets what a stage publishes.
    """
    model, batches = model or make_model(), batches or NumberedBatches()
    optimizer = optimizer or make_optimizer(model)
    ctx = make_context(
        folder,
        **{"stop_signal": lambda: 15 if stop_after and batches.number >= stop_after else None, **(context or {})},
    )
    if extends is not None:
        ctx.inputs["extends"] = extends
    config: Any = SimpleNamespace(schedule=rates or schedule(), save_training_state=keep_state)
    fit(
        ctx,
        config,
        make_step(ctx, model, optimizer, micro_tokens=micro_tokens, dropout=dropout, distillation=distillation),
        batches,
        num_iterations=num_iterations,
        observations=observations(ctx, model) if callable(observations) else observations,
        **{"save": lambda folder: None, **options},
    )
    if keep_state:
        save_checkpoint(ctx.out, model, make_tokenizer(), {})
        (ctx.out / "metrics.jsonl").write_bytes(ctx.records("metrics").path.read_bytes())
    return Trained(ctx, bits(model, optimizer))


def rollout_of(
    prompts: list[list[int]], completions: list[Completion], advantages: np.ndarray[Any, Any], *, padding: int
) -> Rollout:
    """Return completions as the rows of a rollout, each of a question of its own."""
    groups = [
        Group(question=number, prompt=prompt, completions=[completion], rewards=[], parts=[])
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    return Rollout.of_groups(groups, advantages, padding=padding)


def rl_config(**changes: Any) -> RLConfig:
    """Return nanochat's RL in small."""
    small = {"questions_per_iteration": 2, "samples_per_question": 4, "max_new_tokens": 8, "eval_samples": 4}
    return RLConfig(**small | changes)
