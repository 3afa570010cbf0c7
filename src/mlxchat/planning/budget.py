"""The memory that a training may use, and the rows at a time that fit into it; plans that cannot fit are refused.

Nothing here imports MLX, so that `plan` can call it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from mlxchat.adapter_problems import adapter_sizes_of
from mlxchat.config import Config, MachineConfig, OptimizerConfig
from mlxchat.distributed.ranks import current
from mlxchat.errors import ConfigError
from mlxchat.model.sizes import AdapterSizes, GPTSizes, sizes_of
from mlxchat.ops.machine import BATCH_ROWS, CPU_MOST_LANES, DECODED_ROWS, available_cores, device_kind, dtype_name
from mlxchat.planning.horizon import derive_hyperparameters, reference_sizes
from mlxchat.planning.memory import PeakBytes, predict_forward_bytes, predict_peak_bytes
from mlxchat.planning.models import TeacherSize, find_given_sizes, measure_teacher, teacher_folder, teachers_of
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.progress import format_bytes
from mlxchat.tasks import task_class

if TYPE_CHECKING:
    from mlxchat.runner.context import Context

# Of the memory that a device has. On a CPU the rest is Python's, the system's and what malloc keeps; a Mac lets its GPU
# wire three quarters and needs the rest itself; on CUDA the driver and MLX's own kernels take some.
MEMORY_SHARE = {"cpu": 0.8, "metal": 0.7, "cuda": 0.9}
# Beyond so many tokens a step was no faster per token on a CPU (DECISIONS.md); on GPUs what nanochat and the Mac
# configurations use.
MOST_TOKENS = {"cpu": 8192, "metal": 32768, "cuda": 65536}
_CHOICE = "micro_batch.json"


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a training has to fit into."""

    kind: str
    """cpu, metal or cuda."""
    plain: bool
    """Whether MLX's own operations compute, not `mlxchat.cpu`."""
    num_lanes: int
    compute_bytes: int
    limit_bytes: int | None
    """Bytes that may be used; None: only MLX knows."""
    limit_is: str
    """Where the limit comes from, for people."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What of a training its memory depends on."""

    sizes: GPTSizes
    optimizer: OptimizerConfig
    rows: int
    """Of an iteration."""
    row_tokens: int
    recompute: bool
    device: Device
    second_weights: bool = False
    """Whether the trained weights are held twice: the best so far, or RL's frozen reference."""
    teacher: TeacherSize | None = None
    """What a teacher holds, where one is learnt from."""
    samples: bool = False
    """Whether rows are answers that the model samples between the steps."""
    decoded_rows: int = 0
    """How many of them at a time; with `samples` it is chosen to fit."""
    adapters: AdapterSizes | None = None
    """What alone is trained; None: all weights are."""
    num_ranks: int = 1
    """Processes that share an iteration's rows and the moments."""

    @property
    def own_rows(self) -> int:
        """Rows of an iteration that one rank has, at most."""
        return -(-self.rows // self.num_ranks)

    @cached_property
    def sampled_rows(self) -> int:
        """Answers that are sampled at a time: as many as fit beside weights and moments, at least 1; 0: none."""
        if not self.samples:
            return self.decoded_rows
        limit, most = self.device.limit_bytes, min(self.own_rows, DECODED_ROWS)
        if limit is None:
            return most
        sizes = [rows for rows in (*BATCH_ROWS, most) if rows <= most]
        found = (replace(self, samples=False, decoded_rows=rows).parts(1) for rows in sizes)
        fitting = [rows for rows, each in zip(sizes, found, strict=True) if each.while_sampling <= limit]
        return max(fitting, default=1)

    def peak_bytes(self, micro_rows: int) -> int:
        """Return the predicted peak with so many rows at a time."""
        return self.parts(micro_rows).total

    def parts(self, micro_rows: int) -> PeakBytes:
        """Return what makes up the predicted peak with so many rows at a time."""
        return predict_peak_bytes(
            self.sizes,
            self.optimizer,
            rows=self.own_rows,
            micro_rows=micro_rows,
            row_tokens=self.row_tokens,
            num_lanes=self.device.num_lanes,
            compute_bytes=self.device.compute_bytes,
            plain=self.device.plain,
            recompute=self.recompute,
            second_weights=self.second_weights,
            teacher=self.teacher,
            sampled_rows=self.sampled_rows,
            adapters=self.adapters,
            num_ranks=self.num_ranks,
        )

    def fits(self, micro_rows: int) -> bool:
        """Tell whether so many rows at a time fit, as far as is known."""
        return self.device.limit_bytes is None or self.peak_bytes(micro_rows) <= self.device.limit_bytes

    def explain_excess(self, stage: str | None = None) -> str:
        """Return what the smallest possible step needs, the limit and, of a stage, keys that lower the need."""
        text = (
            f"needs about {format_bytes(self.peak_bytes(1))} for one row of {self.row_tokens:,} tokens at a time; "
            f"the limit is {format_bytes(self.device.limit_bytes or 0)} ({self.device.limit_is})"
        )
        if stage is None:
            return text
        keys = [] if self.recompute else ["machine.grad_checkpointing=true"]
        if stage == "pretrain":
            keys.append("a smaller model.depth")
        elif self.teacher is not None:
            keys.append(f"no {stage}.teacher")
        elif self.adapters is None:
            keys.append(f"{stage}.adapter.kind=lora")
        elif self.adapters.bits is None:
            keys.append(f"{stage}.adapter.bits=4")
        keys.append("a smaller rl.max_new_tokens" if stage == "rl" else f"a smaller {stage}.batch.row_tokens")
        return f"{text}. To lower the need: {'; '.join(keys)}"


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What is computed at a time."""

    tokens: int
    predicted_peak_bytes: int
    sampled_rows: int = 0
    """Answers that are sampled at a time."""

    def numbers(self) -> dict[str, int]:
        """Return what is shown and recorded of it."""
        numbers = {"micro_batch_tokens": self.tokens, "predicted_peak_bytes": self.predicted_peak_bytes}
        return {**numbers, "sampled_rows": self.sampled_rows} if self.sampled_rows else numbers


def find_device(machine: MachineConfig, *, ask_mlx: bool = False) -> Device:
    """Return what will compute and how much memory it may use.

    Args:
        machine: what was asked for.
        ask_mlx: whether MLX may be imported, without which a CUDA device's memory is not known.
    """
    kind = device_kind(machine.device)
    half = dtype_name(machine.device, machine.compute_dtype) == "bfloat16"
    plain = kind != "cpu" or os.environ.get("MLXCHAT_CPU") == "plain"
    lanes = 1 if plain else min(machine.blas_threads or available_cores(), CPU_MOST_LANES)
    total = _memory_bytes(kind, ask_mlx=ask_mlx)
    limit, neighbours = machine.memory_limit_bytes, count_ranks(machine)[1]
    if limit is not None:
        where = "machine.memory_limit_bytes"
    elif total is None:
        where = "the device's memory"
    else:
        limit = int(total * MEMORY_SHARE[kind])
        where = f"{MEMORY_SHARE[kind]:.0%} of this machine's {format_bytes(total)}"
        if kind != "cuda" and neighbours > 1:  # there each has a GPU of its own
            limit //= neighbours
            where += f", shared by {neighbours} ranks"
    compute_bytes = 2 if half else 4
    return Device(
        kind=kind, plain=plain, num_lanes=lanes, compute_bytes=compute_bytes, limit_bytes=limit, limit_is=where
    )


def count_ranks(machine: MachineConfig) -> tuple[int, int]:
    """Return how many ranks compute together, and how many of them on this machine."""
    ranks = current()
    return (machine.num_processes,) * 2 if ranks is None else (ranks.size, ranks.on_host_of(0))


def choose_micro_rows(training: Training, most_tokens: int) -> int:
    """Return the rows of the largest micro-batch that fits and has at most `most_tokens` (0: not even one row fits).

    Micro-batches of one size where that costs less than half of it; else as equal as can be.
    """
    rows_of_rank = training.own_rows
    most = max(1, min(rows_of_rank, most_tokens // training.row_tokens))
    fitting = next((rows for rows in range(most, 0, -1) if training.fits(rows)), 0)
    if fitting == 0:
        return 0
    divisor = next(rows for rows in range(fitting, 0, -1) if rows_of_rank % rows == 0)
    return divisor if 2 * divisor > fitting else -(-rows_of_rank // -(-rows_of_rank // fitting))


def choose_micro_batch(
    ctx: Context,
    sizes: GPTSizes,
    *,
    rows: int,
    row_tokens: int,
    second_weights: bool = False,
    teacher: TeacherSize | None = None,
    samples: bool = False,
    adapters: AdapterSizes | None = None,
) -> MicroBatch:
    """Return what a stage computes at a time.

    A training that continues takes what it began with, as long as that fits: sums are rounded by micro-batch.

    Args:
        ctx: of the step.
        sizes: of its model.
        rows: of an iteration.
        row_tokens: of a row, at most.
        second_weights: whether the trained weights are held twice: the best so far, or RL's frozen reference.
        teacher: what a teacher holds, where one is learnt from.
        samples: whether rows are answers that the model samples between the steps.
        adapters: what alone is trained; None: all weights are.

    Raises:
        ConfigError: it does not fit; with the predicted bytes and settings that would.
    """
    machine = ctx.config.machine
    training = Training(
        sizes=sizes,
        optimizer=ctx.config.optimizer,
        rows=rows,
        row_tokens=row_tokens,
        recompute=machine.grad_checkpointing,
        device=find_device(machine, ask_mlx=True),
        second_weights=second_weights,
        teacher=teacher,
        samples=samples,
        adapters=adapters,
        num_ranks=ctx.team.size if ctx.team is not None else 1,
    )
    before = ctx.work / _CHOICE
    begun = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        begun = max(1, int(json.loads(before.read_text(encoding="utf-8"))["tokens"]) // row_tokens)
    if machine.device_batch_tokens is None and begun is not None and training.fits(min(training.own_rows, begun)):
        micro_rows = min(training.own_rows, begun)
    else:
        micro_rows = rows_at_a_time(training, machine)
    if micro_rows == 0:
        raise ConfigError(f"{ctx.step} {training.explain_excess(ctx.stage)}")
    found = MicroBatch(
        tokens=micro_rows * row_tokens,
        predicted_peak_bytes=training.peak_bytes(micro_rows),
        sampled_rows=training.sampled_rows,
    )
    before.parent.mkdir(parents=True, exist_ok=True)
    before.write_text(json.dumps({"tokens": found.tokens}), encoding="utf-8")
    return found


def rows_at_a_time(training: Training, machine: MachineConfig) -> int:
    """Return the rows of a micro-batch: the most that fit, within `machine.device_batch_tokens`; 0: none fits."""
    return choose_micro_rows(training, machine.device_batch_tokens or MOST_TOKENS[training.device.kind])


def forward_tokens(machine: MachineConfig, sizes: GPTSizes, *, training_peak_bytes: int | None = None) -> int:
    """Return how many tokens an evaluation passes through the model at a time.

    Args:
        machine: its limits.
        sizes: of the model.
        training_peak_bytes: predicted peak of the training during which it is evaluated, which must stay the peak.
    """
    if machine.device_batch_tokens is not None:
        return machine.device_batch_tokens
    device = find_device(machine, ask_mlx=True)
    limits = [] if device.limit_bytes is None else [device.limit_bytes]
    if training_peak_bytes is not None:  # less what the optimizer holds, at most two moments of each weight
        limits.append(training_peak_bytes - 2 * predict_forward_bytes(sizes, tokens=0))
    tokens = 2 * MOST_TOKENS[device.kind]
    while tokens > sizes.context_tokens and limits:
        if predict_forward_bytes(sizes, tokens=tokens, compute_bytes=device.compute_bytes) <= min(limits):
            break
        tokens //= 2
    return tokens


def describe_memory(config: Config, plan: Iterable[PlannedStep]) -> dict[str, str]:
    """Return step → predicted peak and micro-batch of the plan's trainings that are to run, for people."""
    lines, plan = {}, list(plan)
    given = find_given_sizes(config, plan)
    for step in plan:
        training = None if step.done else training_of(config, step.stage.name, given.get(step.name))
        if training is not None:
            rows = rows_at_a_time(training, config.machine)
            needed = _need(training, rows or 1)
            needed += f" on each of {training.num_ranks} ranks" if training.num_ranks > 1 else ""
            lines[step.name] = needed if rows else "does not fit"
    return lines


def check_memory(config: Config, plan: Iterable[PlannedStep]) -> None:
    """Refuse a plan with trainings that cannot fit.

    Raises:
        ConfigError: with each one's predicted peak, the limit, and the keys that lower it.
    """
    plan = list(plan)
    given = find_given_sizes(config, plan)
    refused = []
    for step in plan:
        training = None if step.done else training_of(config, step.stage.name, given.get(step.name))
        if training is not None and not rows_at_a_time(training, config.machine):
            refused.append(f"{step.name} {training.explain_excess(step.stage.name)}")
    if refused:
        raise ConfigError("\n".join(refused))


def training_of(config: Config, stage: str, sizes: GPTSizes | None = None) -> Training | None:
    """Return what the memory of a stage's training depends on, as far as the configuration says; None: no training.

    Args:
        config: the whole one.
        stage: its name.
        sizes: of a model that was taken in; None: those of the configuration.

    Raises:
        ConfigError: its adapters do not fit the model.
    """
    if stage not in ("pretrain", "midtrain", "sft", "rl"):
        return None
    sizes = sizes or sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    teacher, adapters = None, None
    if stage != "pretrain":
        adapters = adapter_sizes_of(f"{stage}.adapter", getattr(config, stage).adapter, sizes)
    if stage == "pretrain":
        row_tokens = config.pretrain.batch.row_tokens
        rows = _pretraining_tokens(config, sizes) // row_tokens
    elif stage == "rl":
        row_tokens = bound_answers(config, sizes)
        rows = config.rl.questions_per_iteration * config.rl.samples_per_question
    else:
        batch = (config.midtrain if stage == "midtrain" else config.sft).batch
        row_tokens = batch.row_tokens
        if stage in (taught := teachers_of(config)):
            folder = teacher_folder(taught[stage].teacher, Path(config.outputs))
            teacher = None if folder is None else measure_teacher(folder)
        rows = (batch.tokens or _pretraining_tokens(config, sizes)) // row_tokens
    return Training(
        sizes=sizes, optimizer=config.optimizer, rows=max(1, rows), row_tokens=row_tokens,
        recompute=config.machine.grad_checkpointing, device=find_device(config.machine),
        second_weights=(stage == "pretrain" and config.pretrain.keep == "best")
        or (stage == "rl" and config.rl.kl_coefficient > 0),
        teacher=teacher, samples=stage == "rl", adapters=adapters, num_ranks=count_ranks(config.machine)[0],
    )  # fmt: skip


def bound_answers(config: Config, sizes: GPTSizes) -> int:
    """Return the most tokens of a question and its answer in RL: as the task bounds its prompts, else the context.

    The stage measures the longest prompt and counts again.
    """
    bounds = [task_class(item.task).prompt_tokens for item in (config.rl.task, config.rl.evaluation)]
    if None in bounds:
        return sizes.context_tokens
    return max(bound for bound in bounds if bound is not None) + config.rl.max_new_tokens


def _pretraining_tokens(config: Config, sizes: GPTSizes) -> int:
    """Return the tokens of one of pretraining's iterations."""
    reference = reference_sizes(config.model, config.architecture, config.optimizer, sizes.vocab_size)
    return derive_hyperparameters(config.pretrain, config.optimizer, sizes, reference).batch_tokens


def _need(training: Training, rows: int) -> str:
    return f"{format_bytes(training.peak_bytes(rows))} with {rows * training.row_tokens:,} tokens at a time"


def _memory_bytes(kind: str, *, ask_mlx: bool) -> int | None:
    """Return the memory of the device; a container's share of the machine where it has one."""
    if kind != "cuda":
        total = int(psutil.virtual_memory().total)
        with suppress(OSError, ValueError):
            return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
        return total
    if not ask_mlx:
        return None
    import mlx.core as mx

    info = mx.device_info()
    return int(info["total_memory"]) if "total_memory" in info else None
