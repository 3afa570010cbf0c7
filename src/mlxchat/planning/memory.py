"""Memory of training and decoding: predicted peaks, and the rows at a time that fit.

A step's peak is linear in a few sizes. Each backend has a row of factors, fitted from above to peaks of MLX's
allocator: measured on CPUs, counted in dry runs on Metal and CUDA (docs/internals/performance.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from mlxchat.config.schema import AdapterConfig, Config, MachineConfig, OptimizerConfig
from mlxchat.config.wording import format_bytes
from mlxchat.distributed.ranks import current_team
from mlxchat.errors import ConfigError
from mlxchat.model.sizes import GPTSizes, count_parameters, matrices_of, shapes_of, sizes_of
from mlxchat.ops import machine as bounds
from mlxchat.ops.machine import available_cores, device_kind, dtype_name
from mlxchat.planning.inputs import find_model_sizes
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.files import read_json, write_json

if TYPE_CHECKING:
    from mlxchat.runner.context import Context

# Share of the device's memory that may be used. On a CPU the rest is for Python, the system and malloc's reserves; a
# Mac wires at most three quarters for its GPU; on CUDA the driver and MLX's kernels take some.
_MEMORY_SHARE = {"cpu": 0.8, "metal": 0.7, "cuda": 0.9}
# Larger micro-batches were no faster per token on a CPU (docs/measurements.md); on GPUs what nanochat and the Mac
# configurations use.
_MOST_TOKENS = {"cpu": 8192, "metal": 32768, "cuda": 65536}
_DEFAULT = MachineConfig(device="auto", compute_dtype="auto", memory_limit_bytes=None, blas_threads=None)
_CHOICE = "records/micro_batch.json"
_MASTER_BYTES = 4


class _Factors(NamedTuple):
    """What a step needs beside weights and moments, as multiples of bytes."""

    layer: float  # of a layer's stream, until its gradient is computed
    attention: float  # of a layer's attention weights (H, T, T)
    ends: float  # of the stream outside of the layers
    logits: float  # of the float32 logits that are computed ahead, at most `ahead`
    ahead: int
    head: float  # of the head in float32, if it is trained
    trained: float  # of the trained weights in float32
    lengths: float  # more of a layer's stream with DoRA, for the lengths of rows
    update: float  # of the matrices in float32: Muon's update, once the activations are gone


_FACTORS = {
    "cpu": _Factors(18.9, 0.25, 0.0, 4.0, 3 * bounds.CPU_LOGITS, 5.7, 0.0, 8.9, 7.4),
    "metal": _Factors(15.1, 1.91, 0.0, 1.11, 4 * bounds.LOGITS, 16.0, 1.24, 18.2, 0.0),
    "cuda": _Factors(10.1, 0.89, 50.6, 1.89, 6 * bounds.LOGITS, 9.8, 1.07, 18.5, 0.0),
}
_TEACHER_LOGITS = 3.5  # further copies with a teacher: its logits and exponentials, softened ones, a product
# Of a teacher, per token and channel: its states until the loss is known, and one layer while they are computed.
_TEACHER_NUMBERS = 21
# Decoding: copies of the rows' logits, and numbers per token and channel while a prompt is read.
_DRAWN_LOGITS = 3
_READ = 18
_UNPACKED = 1.5  # copies of the largest matrix that a CPU unpacks in each lane
_GROUP = 64  # packed numbers that share a scale and an offset


@dataclass(frozen=True, kw_only=True)
class Device:
    """The computing device, and how much memory it may use."""

    kind: str = "cpu"  # cpu, metal or cuda
    plain: bool = False  # whether MLX's own operations compute, not `mlxchat.cpu`
    num_lanes: int = 1  # streams that share a micro-batch's rows (`cpu/lanes.py`)
    compute_bytes: int = 4  # of a number that is computed with: 4 in float32, 2 in bfloat16
    limit_bytes: int | None = None  # None: unknown
    limit_is: str = ""  # where the limit comes from, for messages

    def fits(self, needed_bytes: int) -> bool:
        """Return True if the bytes fit, or if the limit is unknown."""
        return self.limit_bytes is None or needed_bytes <= self.limit_bytes

    def most_rows(self, most: int, needed: Callable[[int], int]) -> int:
        """Return the most rows of a KV cache, up to `most`, whose needed bytes fit; 0: not even one."""
        sizes = {most, *(rows for rows in bounds.BATCH_ROWS if rows < most)}
        return max((rows for rows in sizes if self.fits(needed(rows))), default=0)

    def excess(self, needed_bytes: int, what: str, remedies: Sequence[str] = ()) -> str:
        """Return the end of a message: what is needed, the limit, and the settings that lower the need."""
        limit = f"the limit is {format_bytes(self.limit_bytes or 0)} ({self.limit_is})"
        lower = f". To lower the need: {'; '.join(remedies)}" if remedies else ""
        return f"needs about {format_bytes(needed_bytes)} for {what}; {limit}{lower}"


def find_device(machine: MachineConfig | None = None) -> Device:
    """Return the device of a machine (None: the one that MLX chooses) and how much memory it may use."""
    machine = machine or _DEFAULT
    kind = device_kind(machine.device)
    plain = kind != "cpu" or os.environ.get("MLXCHAT_CPU") == "plain"
    limit, where = machine.memory_limit_bytes, "machine.memory_limit_bytes"
    if limit is None and (total := _memory_bytes(kind)) is not None:
        team = current_team()
        sharing = 1 if team is None or kind == "cuda" else team.neighbours  # on CUDA each has its own GPU
        limit = int(total * _MEMORY_SHARE[kind]) // sharing
        where = f"{_MEMORY_SHARE[kind]:.0%} of this machine's {format_bytes(total)}"
        where += f", shared by {sharing} ranks" if sharing > 1 else ""
    lanes = 1 if plain else min(machine.blas_threads or available_cores(), bounds.CPU_MOST_LANES)
    width = 2 if dtype_name(machine.device, machine.compute_dtype) == "bfloat16" else 4
    return Device(kind=kind, plain=plain, limit_bytes=limit, limit_is=where, num_lanes=lanes, compute_bytes=width)


def _memory_bytes(kind: str) -> int | None:
    """Return the memory of the device; a container's share of the machine where it has one; None: unknown."""
    if kind == "cuda":
        with suppress(ImportError, KeyError, RuntimeError):  # a login node without a GPU, which plans steps for others
            import mlx.core as mx

            return int(mx.device_info()["total_memory"])
        return None
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What the memory of decoding depends on."""

    sizes: GPTSizes
    row_tokens: int  # prompt and answer, at most
    device: Device = Device()
    bits: int | None = None  # of the model's matrices once they are packed; None: those of the compute type
    kept_tokens: int = 0  # whose keys and values are kept for later prompts
    remedies: tuple[str, ...] = ()  # settings that lower the need, for messages

    def on(self, machine: MachineConfig) -> Decoding:
        """Return the same on the device of a machine."""
        return replace(self, device=find_device(machine))

    def bytes_beside_weights(self, rows: int) -> int:
        """Return the engine's bytes with this many rows at a time: KV cache, a prompt, logits."""
        sizes, device = self.sizes, self.device
        # The prompts that were read are copied into the cache.
        room = rows * (bounds.round_up(self.row_tokens, bounds.KV_TOKENS) + self.row_tokens) + self.kept_tokens
        numbers = 2.0 * sizes.kv_width * room * sizes.num_layers
        numbers += _READ * min(self.row_tokens, bounds.PREFILL_TOKENS) * sizes.width
        numbers += _DRAWN_LOGITS * rows * sizes.vocab_size * 4 / device.compute_bytes
        if self.bits is not None and not device.plain:  # a CPU unpacks the matrices that it reads prompts with
            numbers += _UNPACKED * (1 + device.num_lanes) * 4 * sizes.width**2
        return round(numbers * device.compute_bytes)

    def packed_bytes(self) -> int:
        """Return the bytes of the matrices and the head, packed where there are `bits`."""
        counts, whole = count_parameters(self.sizes), self.device.compute_bytes
        each = whole if self.bits is None else self.bits / 8 + 2 * whole / _GROUP
        return round((counts["matrices"] + counts["head"]) * each)

    def peak_bytes(self, rows: int) -> int:
        """Return the peak with this many rows at a time: weights and engine, or weights being packed."""
        counts = count_parameters(self.sizes)
        whole = counts["total"] * self.device.compute_bytes
        weights = whole - (counts["matrices"] + counts["head"]) * self.device.compute_bytes + self.packed_bytes()
        return weights + max(self.bytes_beside_weights(rows), 0 if self.bits is None else whole)

    def fitting_rows(self, machine: MachineConfig) -> int:
        """Return how many answers fit at a time; 0: none."""
        return self.device.most_rows(bounds.DECODED_ROWS, self.peak_bytes)

    def rows(self, what: str, *, most: int = bounds.DECODED_ROWS, held_bytes: int = 0) -> int:
        """Return how many answers fit at a time beside `held_bytes`, at most `most`; an error begins with `what`."""
        if rows := self.device.most_rows(most, lambda rows: held_bytes + self.peak_bytes(rows)):
            return rows
        raise ConfigError(f"{what} {self.explain_excess(held_bytes)}")

    def explain_excess(self, held_bytes: int = 0) -> str:
        """Return what one row needs, the limit, and the settings that lower the need."""
        row = f"its weights and one row of {self.row_tokens:,} tokens, prompt and answer"
        return self.device.excess(held_bytes + self.peak_bytes(1), row, self.remedies)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the memory of a training depends on."""

    sizes: GPTSizes
    optimizer: OptimizerConfig
    rows: int  # of an iteration
    row_tokens: int
    device: Device = Device()
    recompute: bool = False  # whether layers keep only their input (`machine.grad_checkpointing`)
    further_weights: int = 0  # further copies of the trained weights: RL's frozen reference
    teacher: GPTSizes | None = None  # a frozen model whose distributions are learnt
    adapters: AdapterConfig | None = None  # the only weights that are trained; None: all weights are
    sampling: Decoding | None = None  # what generates answers between steps, on the same device: RL, samples, tasks
    sampled_rows: int = bounds.DECODED_ROWS  # of these at a time, at most
    num_ranks: int = 1  # processes that share an iteration's rows
    remedies: tuple[str, ...] = ()  # settings of the stage that lower the need, for messages

    def on(self, machine: MachineConfig) -> Training:
        """Return the same on the device and ranks of a machine: `find_device`."""
        ranks = 1 if (team := current_team()) is None else team.size
        return replace(self, device=find_device(machine), recompute=machine.grad_checkpointing, num_ranks=ranks)

    @cached_property
    def trained(self) -> int:
        """Number of trained parameters."""
        if self.adapters is None:
            return count_parameters(self.sizes)["total"]
        return sum(map(math.prod, shapes_of(self.adapters, self.sizes).values()))

    @cached_property
    def matrices(self) -> int:
        """Number of parameters that Muon updates."""
        is_muon = self.optimizer.kind == "muon" and self.adapters is None
        return count_parameters(self.sizes)["matrices"] if is_muon else 0

    @property
    def own_rows(self) -> int:
        """Rows of an iteration that one rank has, at most."""
        return -(-self.rows // self.num_ranks)

    @cached_property
    def held_bytes(self) -> int:
        """Bytes between steps: weights, moments, further copies of trained weights, a teacher's weights."""
        moments = 2 * self.trained - self.matrices
        held = _MASTER_BYTES * (self.trained * (1 + self.further_weights) + moments)
        held += 0 if self.teacher is None else _MASTER_BYTES * count_parameters(self.teacher)["total"]
        adapters, compute_bytes = self.adapters, self.device.compute_bytes
        if adapters is not None:  # and the frozen weights below them
            held += count_parameters(self.sizes)["total"] * compute_bytes
            if adapters.bits is not None:
                numbers = sum(rows * columns for rows, columns in matrices_of(self.sizes).values())
                held += round(numbers * (adapters.bits / 8 + (2 / adapters.group_size - 1) * compute_bytes))
        return held

    def step_bytes(self, micro_rows: int) -> int:
        """Return the bytes of a step beside the held ones, with this many rows at a time."""
        sizes, device, adapters, teacher = self.sizes, self.device, self.adapters, self.teacher
        factors = _FACTORS["cuda" if device.kind == "cuda" else "metal" if device.plain else "cpu"]
        counts = count_parameters(sizes)
        rows = min(micro_rows, self.own_rows)
        tokens = rows * self.row_tokens
        stream = tokens * sizes.width * device.compute_bytes
        attention = tokens * self.row_tokens * sizes.num_heads * device.compute_bytes
        ahead = max(factors.ahead, 3 * bounds.CPU_LEAST_LOGITS_ROWS * sizes.vocab_size)
        logits = _MASTER_BYTES * min(tokens * sizes.vocab_size, ahead)
        whole = _MASTER_BYTES * self.trained
        # A lane has its own whole gradients, except for embeddings, of which it computes the rows that it read.
        lanes = min(device.num_lanes, rows)
        tables = counts["embedding"] + counts["value_embeddings"] if adapters is None else 0
        gradients = _MASTER_BYTES * (lanes * (self.trained - tables) + tables)

        layer = factors.layer * stream + factors.attention * attention
        if adapters is not None and adapters.kind == "dora":
            layer += factors.lengths * stream
        needed = factors.ends * stream + factors.logits * logits + factors.trained * whole
        needed += layer + sizes.num_layers * stream if self.recompute else sizes.num_layers * layer
        if adapters is None:
            needed += factors.head * _MASTER_BYTES * counts["head"]
        if self.own_rows > rows:
            needed += gradients
        if teacher is not None:
            needed += _TEACHER_NUMBERS * _MASTER_BYTES * tokens * teacher.width + _TEACHER_LOGITS * logits
        update = factors.update * _MASTER_BYTES * self.matrices
        # Sums of several lanes' or ranks' gradients, and new weights beside the old ones.
        summing = gradients + whole if lanes > 1 or self.num_ranks > 1 else 0
        return round(max(needed, update, summing))

    def sampling_bytes(self, rows: int) -> int:
        """Return the bytes of generating answers beside the held ones, with this many rows at a time."""
        if self.sampling is None:
            return 0
        sampling = replace(self.sampling, device=self.device)
        needed = sampling.bytes_beside_weights(rows)
        if self.adapters is None and self.device.compute_bytes != _MASTER_BYTES:
            needed += self.trained * self.device.compute_bytes
        return needed if sampling.bits is None else needed + sampling.packed_bytes()

    @cached_property
    def sampled_at_a_time(self) -> int:
        """Answers that are generated at a time: the most that fit, at least 1; 0: none are generated."""
        if self.sampling is None:
            return 0
        fitting = self.device.most_rows(self.sampled_rows, lambda rows: self.held_bytes + self.sampling_bytes(rows))
        return max(1, fitting)

    def peak_bytes(self, micro_rows: int) -> int:
        """Return the predicted peak with this many rows at a time."""
        return self.held_bytes + max(self.step_bytes(micro_rows), self.sampling_bytes(self.sampled_at_a_time))

    def fitting_rows(self, machine: MachineConfig) -> int:
        """Return the rows of the largest micro-batch that fits; 0: not even one row.

        Micro-batches have one size where that costs less than half of it; otherwise they are as equal as possible.
        """
        most_tokens = machine.device_batch_tokens or _MOST_TOKENS[self.device.kind]
        most = max(1, min(self.own_rows, most_tokens // self.row_tokens))
        fitting = next((rows for rows in range(most, 0, -1) if self.device.fits(self.peak_bytes(rows))), 0)
        if fitting == 0:
            return 0
        divisor = next(rows for rows in range(fitting, 0, -1) if self.own_rows % rows == 0)
        return divisor if 2 * divisor > fitting else -(-self.own_rows // -(-self.own_rows // fitting))

    def explain_excess(self) -> str:
        """Return what the smallest possible step needs, the limit, and the settings that lower the need."""
        remedies = self.remedies
        if remedies and not self.recompute:
            remedies = "machine.grad_checkpointing=true", *remedies
        return self.device.excess(self.peak_bytes(1), f"one row of {self.row_tokens:,} tokens at a time", remedies)


class MicroBatch(NamedTuple):
    """The rows computed at a time."""

    tokens: int
    predicted_peak_bytes: int
    sampled_rows: int  # answers that are generated at a time

    def numbers(self) -> dict[str, int]:
        """Return its numbers for display and manifest."""
        sampled = {"sampled_rows": self.sampled_rows} if self.sampled_rows else {}
        return {"micro_batch_tokens": self.tokens, "predicted_peak_bytes": self.predicted_peak_bytes, **sampled}


def choose_micro_batch(ctx: Context, training: Training) -> MicroBatch:
    """Return the micro-batch of a stage; a resumed training keeps its own, on which rounding depends."""
    machine = ctx.config.machine
    training = training.on(machine)
    chosen = ctx.work / _CHOICE
    begun = None if machine.device_batch_tokens is not None else read_json(chosen)
    rows = 0 if begun is None else min(training.own_rows, max(1, begun["tokens"] // training.row_tokens))
    if rows == 0 or not training.device.fits(training.peak_bytes(rows)):
        rows = training.fitting_rows(machine)
    if rows == 0:
        raise ConfigError(f"{ctx.step} {training.explain_excess()}")
    tokens = rows * training.row_tokens
    write_json(chosen, {"tokens": tokens})
    return MicroBatch(tokens, training.peak_bytes(rows), training.sampled_at_a_time)


def forward_tokens(machine: MachineConfig, sizes: GPTSizes) -> int:
    """Return how many tokens an evaluation passes through a model at a time, within the limits of the machine."""
    device, factors = find_device(machine), _FACTORS["cpu"]
    most = machine.device_batch_tokens or 2 * _MOST_TOKENS[device.kind]
    if machine.device_batch_tokens is not None or device.limit_bytes is None:
        return most
    free = device.limit_bytes - _MASTER_BYTES * count_parameters(sizes)["total"]
    each = factors.layer * sizes.width * device.compute_bytes + factors.logits * sizes.vocab_size * _MASTER_BYTES
    return max(sizes.context_tokens, min(most, int(free / each)))


class Forecast(NamedTuple):
    """Memory of a pending step."""

    peak_bytes: int
    text: str  # of a training: peak and micro-batch, for plans
    problem: str  # why it does not fit, with the settings that lower the need; empty if it fits


def forecast_memory(config: Config, plan: Iterable[PlannedStep]) -> dict[str, Forecast]:
    """Return step → memory of the pending steps whose stages describe it."""
    plan = list(plan)
    sizes, found = find_model_sizes(config, plan), {}
    for step in plan:
        if step.done or step.stage.memory is None:
            continue
        set_up = step.config
        own = sizes_of(set_up.model, set_up.architecture, set_up.tokenizer.vocab_size)
        described: Training | Decoding = step.stage.memory(set_up, step.stage.name, sizes.get(step.name, own))
        need = described.on(set_up.machine)
        rows, text, problem = need.fitting_rows(config.machine), "", ""
        peak = need.peak_bytes(rows or 1)
        if rows == 0:
            text, problem = "does not fit", f"{step.name} {need.explain_excess()}"
        elif isinstance(need, Training):
            each = f" on each of {need.num_ranks} ranks" if need.num_ranks > 1 else ""
            text = f"{format_bytes(peak)} with {rows * need.row_tokens:,} tokens at a time{each}"
        found[step.name] = Forecast(peak, text, problem)
    return found


def check_memory(config: Config, plan: Iterable[PlannedStep]) -> None:
    """Raise a ConfigError with each step that does not fit."""
    if problems := [each.problem for each in forecast_memory(config, plan).values() if each.problem]:
        raise ConfigError("\n".join(problems))
