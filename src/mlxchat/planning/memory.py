"""Memory of training, sampling and forward passes: predicted peaks, and the rows at a time that fit. Imports no MLX.

A training step peaks at one of four moments: when the backward pass begins (activations, logits, gradients of the
head), when it ends and its gradients are added to earlier ones, when the lanes' gradients are added up, or while the
optimizer moves the parameters. The factors were fitted to `mx.get_peak_memory()` (docs/measurements.md);
tests/planning/test_memory.py compares predictions with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from mlxchat.config.schema import Config, MachineConfig, OptimizerConfig
from mlxchat.config.wording import format_bytes
from mlxchat.distributed.ranks import current
from mlxchat.errors import ConfigError
from mlxchat.model.sizes import (
    AdapterSizes,
    GPTSizes,
    count_adapter_parameters,
    count_parameters,
    matrices_of,
    sizes_of,
)
from mlxchat.ops import machine as bounds
from mlxchat.ops.machine import available_cores, device_kind, dtype_name
from mlxchat.planning.given import find_given_sizes
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.stage import Stage

if TYPE_CHECKING:
    from mlxchat.runner.context import Context

# Share of the device's memory that may be used. On a CPU the rest is for Python, the system and malloc's reserves; a
# Mac wires at most three quarters for its GPU; on CUDA the driver and MLX's kernels take some.
MEMORY_SHARE = {"cpu": 0.8, "metal": 0.7, "cuda": 0.9}
# Larger micro-batches were no faster per token on a CPU (docs/measurements.md); on GPUs what nanochat and the Mac
# configurations use.
MOST_TOKENS = {"cpu": 8192, "metal": 32768, "cuda": 65536}
_DEFAULT = MachineConfig(
    device="auto", compute_dtype="auto", memory_limit_bytes=None, blas_threads=None, num_processes=1
)
_CHOICE = "records/micro_batch.json"
_MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """How much a step keeps, as multiples."""

    layer: tuple[float, float]
    """Numbers per token and channel that a layer keeps for its gradient: in the compute type, and in float32."""
    ends: tuple[float, float]
    """The same of everything outside of the layers: embedding, final norm, gradients on their way."""
    attention: float
    """Copies of one layer's attention weights."""
    logits: float
    """Copies of a chunk's logits, in float32."""
    head: float
    """Copies of the head's gradient, in float32, of each lane."""
    muon: float
    """Copies of all matrices in Muon's workspace."""


# The CPU's own kernels, which compute attention by blocks and the logits of three chunks at once.
_CPU = _Factors(layer=(15.0, 0.0), ends=(8.6, 0.0), attention=1.5, logits=2.7, head=1.1, muon=5.0)
_CPU_CHUNKS = 3
# The head's gradients for chunks that MLX begins early, and their maximum; Muon's copies if lanes share them.
_CPU_HEAD_PER_CHUNK, _CPU_MOST_HEADS, _CPU_MUON_OF_LANES = 0.4, 8, 8.5
# MLX's own operations, as on Metal and CUDA.
_PLAIN = _Factors(layer=(19.5, 6.0), ends=(17.0, 2.5), attention=5.0, logits=3.0, head=2.0, muon=1.05)
# With recomputation, what a layer keeps (its input and the residual's sum), and what lies outside of the layers while
# a layer is computed again.
_LAYER_INPUT, _PLAIN_RECOMPUTED_ENDS = 0.5, 9.0
# What a layer keeps in addition for learnt residual scalars (the stream they scale) and a gated value embedding.
_RESIDUAL, _VALUE_EMBEDDING = 1.0, 1.4
_TEACHER_LOGITS = 3.5  # further copies with a teacher: its logits and exponentials, softened ones, a product
# Layers' KV caches that exist twice while they grow or, with MLX's own operations, are written.
_CPU_GROWING, _PLAIN_GROWING = 1.0, 1.7
# Copies of the sampled rows' logits, and numbers per token and channel while a prompt is read.
_DRAWN_LOGITS, _READ = 3.0, 18.0
# Copies of the largest matrix in a lane: unpacked (in sampling one lane's more); and with its adapter, squared, for the
# lengths of rows.
_UNPACKED, _LENGTHS = 1.5, 6.0
_ADAMW = 3  # a parameter and its two moments while the old ones exist
_GROUP = 64  # packed numbers that share a scale and an offset


@dataclass(frozen=True, kw_only=True)
class Device:
    """The computing device, and how much memory it may use."""

    kind: str = "cpu"
    """cpu, metal or cuda."""
    plain: bool = False
    """Whether MLX's own operations compute, not `mlxchat.cpu`."""
    num_lanes: int = 1
    """Streams that share a micro-batch's rows (`ops.device.Lanes`)."""
    compute_bytes: int = 4
    """Of a number that is computed with: 4 in float32, 2 in bfloat16."""
    limit_bytes: int | None = None
    """None: unknown without MLX."""
    limit_is: str = ""
    """Where the limit comes from, for messages."""

    def fits(self, needed_bytes: int) -> bool:
        """Return True if the bytes fit, or if the limit is unknown."""
        return self.limit_bytes is None or needed_bytes <= self.limit_bytes

    def most_rows(self, most: int, needed: Callable[[int], int]) -> int:
        """Return the most rows of a KV cache, up to `most`, whose needed bytes fit; 0: not even one."""
        sizes = sorted({most, *(rows for rows in bounds.BATCH_ROWS if rows < most)})
        return max((rows for rows in sizes if self.fits(needed(rows))), default=0)

    def excess(self, needed_bytes: int, what: str, remedies: Iterable[str] = ()) -> str:
        """Return the end of a message: what is needed, the limit, and the settings that lower the need."""
        limit = f"the limit is {format_bytes(self.limit_bytes or 0)} ({self.limit_is})"
        lower = "; ".join(remedies)
        text = f"needs about {format_bytes(needed_bytes)} for {what}; {limit}"
        return f"{text}. To lower the need: {lower}" if lower else text


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What the memory of decoding depends on."""

    sizes: GPTSizes
    row_tokens: int
    """Prompt and answer, at most."""
    device: Device = Device()
    bits: int | None = None
    """Of the model's matrices once they are packed; None: those of the compute type."""
    kv_bits: int | None = None
    """Of keys and values; None: those of the compute type."""
    kept_tokens: int = 0
    """Whose keys and values are kept for later prompts."""
    trained: bool = False
    """Whether the model is trained between answers: then packed weights do not replace its own."""
    casts: bool = False
    """Whether float32 weights are cast to the compute type meanwhile."""
    remedies: tuple[str, ...] = ()
    """Settings that lower the need, for messages."""

    def on(self, machine: MachineConfig, *, ask_mlx: bool = False) -> Decoding:
        """Return the same on the device of a machine: `find_device`."""
        return replace(self, device=find_device(machine, ask_mlx=ask_mlx))

    def bytes_beside_weights(self, rows: int) -> int:
        """Return the engine's bytes with this many rows at a time: KV cache, a prompt, a copy of the weights."""
        sizes, device, counts = self.sizes, self.device, count_parameters(self.sizes)
        room = -(-self.row_tokens // bounds.KV_TOKENS) * bounds.KV_TOKENS
        held = [room if window is None else min(room, window + bounds.KV_TOKENS) for window in sizes.windows()]
        of_token = 2 * sizes.kv_width * self._packed(self.kv_bits)
        # Beside the rows' past: layers' once more while they grow, or a prompt that is read, or logits in float32.
        growing = (_PLAIN_GROWING if device.plain else _CPU_GROWING) * of_token * rows * max(held)
        reading = _READ * min(self.row_tokens, bounds.PREFILL_TOKENS) * sizes.width
        reading += of_token * sizes.num_layers * self.row_tokens
        if self.bits is not None and not device.plain:  # a CPU unpacks the matrices that it reads prompts with
            reading += _UNPACKED * (1 + device.num_lanes) * 4 * sizes.width**2
        drawing = _DRAWN_LOGITS * rows * sizes.vocab_size * 4 / device.compute_bytes
        # A CPU's decoder has a copy of the weights in another order, of a trained model unpacked.
        ordered = counts["total"] if self.trained else self._weights()
        copied: float = 0 if device.plain else ordered - counts["embedding"]
        copied = counts["total"] if self.casts else copied
        copied += self._products() if self.trained and self.bits is not None else 0
        numbers = copied + of_token * rows * sum(held) + max(growing, reading, drawing)
        return round((numbers + of_token * sizes.num_layers * self.kept_tokens) * device.compute_bytes)

    def rows(self, what: str, *, most: int = bounds.DECODED_ROWS, held_bytes: int = 0) -> int:
        """Return how many answers fit at a time beside the weights and `held_bytes`, at most `most`.

        Raises:
            ConfigError: none fits; the message begins with `what`.
        """
        if found := self.device.most_rows(most, lambda rows: held_bytes + self.peak_bytes(rows)):
            return found
        row = f"its weights and one row of {self.row_tokens:,} tokens, prompt and answer"
        raise ConfigError(f"{what} {self.device.excess(held_bytes + self.peak_bytes(1), row, self.remedies)}")

    def peak_bytes(self, rows: int) -> int:
        """Return the peak with this many rows at a time: weights and engine, or weights being packed."""
        weights = round(self._weights() * self.device.compute_bytes)
        whole = count_parameters(self.sizes)["total"] * self.device.compute_bytes
        loading = 0 if self.bits is None else weights + whole
        return max(loading, weights + self.bytes_beside_weights(rows))

    def _weights(self) -> float:
        """Return the size of the weights in numbers of the compute type."""
        counts = count_parameters(self.sizes)
        return counts["total"] - counts["matrices"] - counts["head"] + self._products()

    def _products(self) -> float:
        """Return the size of the matrices and the head, packed ones where there are `bits`, in the same numbers."""
        counts = count_parameters(self.sizes)
        return (counts["matrices"] + counts["head"]) * self._packed(self.bits)

    def _packed(self, bits: int | None) -> float:
        """Return the size of a number, its share of scale and offset included, in numbers of the compute type."""
        return 1 if bits is None else bits / (8 * self.device.compute_bytes) + 2 / _GROUP


@dataclass(frozen=True, kw_only=True)
class TeacherSize:
    """Memory of a teacher, in bytes."""

    weights: int
    """Size of its files."""
    kept_per_token: int
    """Of a micro-batch, until its loss is known: final states, or the keys and values of mlx-lm's cache."""
    working_per_token: int
    """Of a micro-batch, before there are logits: the numbers of one layer."""


@dataclass(frozen=True, kw_only=True)
class PeakBytes:
    """Memory of a training, in bytes."""

    weights: int
    moments: int
    """The optimizer's state."""
    kept: int
    """Further copies of the trained weights, and a teacher's weights."""
    gradients: int
    """Of all lanes, once the backward pass is done."""
    working: int
    """The most that a step needs in addition."""
    sampled_rows: int = 0
    """Answers that are sampled at a time between steps: the most that fit, at least 1."""
    sampling: int = 0
    """What these need in addition."""

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.moments + self.kept + max(self.working, self.sampling)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the memory of a training depends on."""

    sizes: GPTSizes
    optimizer: OptimizerConfig
    rows: int
    """Of an iteration."""
    row_tokens: int
    device: Device = Device()
    recompute: bool = False
    """Whether layers keep only their input (`machine.grad_checkpointing`)."""
    further_weights: int = 0
    """Further copies of the trained weights: the best so far, RL's frozen reference."""
    teacher: TeacherSize | None = None
    """A frozen model whose distributions are learnt."""
    adapters: AdapterSizes | None = None
    """The only weights that are trained; None: all weights are."""
    sampled_rows: int = 0
    """Answers that RL, samples or tasks generate at a time between steps, at most."""
    sampled_tokens: int = 0
    """Of such a row, prompt and answer."""
    sampled_bits: int | None = None
    """Of packed weights with which RL samples (`rl.rollout_bits`)."""
    num_ranks: int = 1
    """Processes that share an iteration's rows and the moments."""
    remedies: tuple[str, ...] = ()
    """Settings of the stage that lower the need, for messages."""

    def on(self, machine: MachineConfig, *, ask_mlx: bool = False) -> Training:
        """Return the same on the device and ranks of a machine: `find_device`."""
        device, ranks = find_device(machine, ask_mlx=ask_mlx), count_ranks(machine)[0]
        return replace(self, device=device, recompute=machine.grad_checkpointing, num_ranks=ranks)

    @property
    def own_rows(self) -> int:
        """Rows of an iteration that one rank has, at most."""
        return -(-self.rows // self.num_ranks)

    def peak_bytes(self, micro_rows: int) -> int:
        """Return the predicted peak with this many rows at a time."""
        return predict_peak(self, micro_rows).total

    def fits(self, micro_rows: int) -> bool:
        """Return True if this many rows at a time fit, or if the limit is unknown."""
        return self.device.fits(self.peak_bytes(micro_rows))

    def micro_rows(self, most_tokens: int) -> int:
        """Return the rows of the largest micro-batch that fits and has at most `most_tokens`; 0: not even one row fits.

        Micro-batches have one size where that costs less than half of it; otherwise they are as equal as possible.
        """
        most = max(1, min(self.own_rows, most_tokens // self.row_tokens))
        fitting = next((rows for rows in range(most, 0, -1) if self.fits(rows)), 0)
        if fitting == 0:
            return 0
        divisor = next(rows for rows in range(fitting, 0, -1) if self.own_rows % rows == 0)
        return divisor if 2 * divisor > fitting else -(-self.own_rows // -(-self.own_rows // fitting))

    def explain_excess(self) -> str:
        """Return what the smallest possible step needs, the limit, and the settings that lower the need."""
        remedies = self.remedies
        if remedies and not self.recompute:
            remedies = "machine.grad_checkpointing=true", *remedies
        what = f"one row of {self.row_tokens:,} tokens at a time"
        return self.device.excess(self.peak_bytes(1), what, remedies)


# Predictions


def predict_peak(training: Training, micro_rows: int) -> PeakBytes:
    """Return the memory of a training with `micro_rows` rows at a time, within about 15 %."""
    sizes, device, adapters, teacher = training.sizes, training.device, training.adapters, training.teacher
    plain, compute_bytes, rows, num_ranks = device.plain, device.compute_bytes, training.own_rows, training.num_ranks
    factors = _PLAIN if plain else _CPU
    counts = count_parameters(sizes)
    parameters, matrices = counts["total"], counts["matrices"]
    muon = training.optimizer.kind == "muon" and adapters is None
    lanes = min(device.num_lanes, micro_rows)
    tokens = min(micro_rows, rows) * training.row_tokens
    value_layers = sum(map(sizes.has_value_embedding, range(sizes.num_layers)))
    casts = adapters is None and compute_bytes != _MASTER_BYTES
    if adapters is None:
        # A lane has its own whole gradients, except for embeddings, of which it computes the rows that it read.
        trained, frozen, tables = parameters, 0, counts["embedding"] + counts["value_embeddings"]
        # Shares of the matrices and tables are updated in parallel, also where a micro-batch has fewer rows than lanes.
        workspace = _ADAMW * max(counts["embedding"], 4 * sizes.width**2) * min(device.num_lanes, 2 + value_layers)
        if muon:
            share = factors.muon if plain else min(factors.muon, _CPU_MUON_OF_LANES / device.num_lanes)
            workspace = max(workspace, round(matrices * share))
    else:
        trained, tables = count_adapter_parameters(adapters, sizes), 0
        frozen, workspace = _frozen_bytes(sizes, adapters, compute_bytes), _ADAMW * trained
    gradients = (lanes * (trained - tables) + tables) * _MASTER_BYTES
    accumulated = gradients if rows > micro_rows else 0
    logits = _logits_bytes(training, tokens, lanes)
    activations = _activation_bytes(training, tokens, again_bytes=trained * compute_bytes - logits)
    activations += parameters * compute_bytes if casts else 0
    if adapters is not None:
        activations += _adapter_bytes(training, adapters, tokens, lanes)
    if teacher is not None:  # its layers are done before there are logits
        activations += teacher.kept_per_token * tokens
        logits = max(logits, teacher.working_per_token * tokens)
    whole = trained * _MASTER_BYTES
    summing = gradients + (whole if lanes > 1 else 0)
    moving = whole + workspace * _MASTER_BYTES
    if num_ranks > 1:
        bucket = min(whole, max(bounds.BUCKET_BYTES, counts["embedding"] * _MASTER_BYTES))
        summing = max(summing, whole + 2 * bucket)
        # New weights arrive before the old ones are freed; each rank's part exists once more, and as a message.
        arriving = min(whole, num_ranks * bucket) + 2 * whole // num_ranks
        moving = max(whole + workspace * _MASTER_BYTES // num_ranks, arriving)
    backward = accumulated + max(round(activations + logits), gradients)
    found = PeakBytes(
        weights=frozen + whole,
        moments=(2 * trained - (matrices if muon else 0)) * _MASTER_BYTES // num_ranks,
        kept=whole * training.further_weights + (teacher.weights if teacher else 0),
        gradients=gradients,
        working=max(backward, summing, moving),
    )
    if not training.sampled_rows:
        return found
    decoding = Decoding(
        sizes=sizes, device=device, row_tokens=training.sampled_tokens, bits=training.sampled_bits, trained=True,
        casts=casts,
    )  # fmt: skip
    held = found.weights + found.moments + found.kept
    most = device.most_rows(training.sampled_rows, lambda rows: held + decoding.bytes_beside_weights(rows))
    return replace(found, sampled_rows=max(1, most), sampling=decoding.bytes_beside_weights(max(1, most)))


def _activation_bytes(training: Training, tokens: int, *, again_bytes: float) -> float:
    """Return what the backward pass needs of the layers, attention's weights included.

    `again_bytes` is needed in addition while a layer is recomputed: gradients so far, less the logits, freed by then.
    """
    sizes, plain, compute_bytes = training.sizes, training.device.plain, training.device.compute_bytes
    factors, row_tokens = _PLAIN if plain else _CPU, training.row_tokens
    states = tokens * sizes.width
    layer, ends = (numbers * compute_bytes + floats * 4 for numbers, floats in (factors.layer, factors.ends))
    residual = _RESIDUAL * compute_bytes * sizes.residual_scalars
    each = (_LAYER_INPUT * compute_bytes if training.recompute else layer) + residual
    value_layers = sum(map(sizes.has_value_embedding, range(sizes.num_layers)))
    kept = states * (sizes.num_layers * each + value_layers * _VALUE_EMBEDDING * compute_bytes)
    keys: float = row_tokens if plain else max(_mean_keys(row_tokens, window) for window in sizes.windows())
    attention = factors.attention * tokens * sizes.num_heads * keys * compute_bytes
    if plain and training.recompute:
        again = states * (layer + _PLAIN_RECOMPUTED_ENDS * compute_bytes) + attention
        return kept + max(states * ends, again + again_bytes)
    return kept + states * ends + attention


def _logits_bytes(training: Training, tokens: int, lanes: int) -> float:
    """Return the bytes of some chunks' logits and, unless the head is frozen, of the head's gradients."""
    vocab_size, plain = training.sizes.vocab_size, training.device.plain
    factors = _PLAIN if plain else _CPU
    if plain:
        chunk_rows = at_once = max(1, bounds.LOGITS // vocab_size)
    else:
        chunk_rows = max(bounds.CPU_LEAST_LOGITS_ROWS, bounds.CPU_LOGITS // vocab_size)
        at_once = _CPU_CHUNKS * chunk_rows
    copies = factors.logits + (_TEACHER_LOGITS if training.teacher is not None else 0)
    numbers = copies * min(tokens, at_once) * vocab_size
    if training.adapters is None:
        chunks = 0 if plain else lanes * -(-tokens // (lanes * chunk_rows))
        heads = factors.head * lanes + _CPU_HEAD_PER_CHUNK * min(chunks, _CPU_MOST_HEADS)
        numbers += heads * count_parameters(training.sizes)["head"]
    return numbers * _MASTER_BYTES


def _frozen_bytes(sizes: GPTSizes, adapters: AdapterSizes, compute_bytes: int) -> int:
    """Return the weights below adapters."""
    frozen = count_parameters(sizes)["total"] * compute_bytes
    if adapters.bits is None:
        return frozen
    numbers = sum(rows * columns for rows, columns in matrices_of(sizes).values())
    return frozen + round(numbers * (adapters.bits / 8 + (2 / adapters.group_size - 1) * compute_bytes))


def _adapter_bytes(training: Training, adapters: AdapterSizes, tokens: int, lanes: int) -> float:
    """Return the bytes computed from frozen matrices: unpacked ones, and DoRA's row lengths with what they scale."""
    largest = 4 * training.sizes.width**2 * training.device.compute_bytes
    found = 0.0 if adapters.bits is None else _UNPACKED * lanes * largest
    if adapters.kind == "dora":
        # What is multiplied with rows' lengths, for their gradient; of c_fc it is kept anyway.
        shapes = matrices_of(training.sizes)
        columns = [shapes[name][0] for name in adapters.targets if not name.endswith("c_fc")]
        found += _LENGTHS * lanes * largest
        found += tokens * training.device.compute_bytes * (max if training.recompute else sum)([0, *columns])
    return found


def predict_forward_bytes(sizes: GPTSizes, *, tokens: int, compute_bytes: int = 4) -> int:
    """Return the approximate bytes of a forward pass with losses: weights, a few layers' streams, logits."""
    weights = count_parameters(sizes)["total"] * _MASTER_BYTES
    streams = (_CPU.layer[0] + _CPU.ends[0]) * sizes.width * compute_bytes
    return weights + round(tokens * (streams + _CPU.logits * sizes.vocab_size * _MASTER_BYTES))


def _mean_keys(tokens: int, window: int | None) -> float:
    """Return how many keys a token is multiplied with on average, in whole blocks."""
    stops = range(bounds.CPU_ATTENTION_TOKENS, tokens + bounds.CPU_ATTENTION_TOKENS, bounds.CPU_ATTENTION_TOKENS)
    return sum(min(stop, (tokens if window is None else window) + bounds.CPU_ATTENTION_TOKENS) for stop in stops) / len(
        stops
    )


# What fits


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The rows computed at a time."""

    tokens: int
    predicted_peak_bytes: int
    sampled_rows: int = 0
    """Answers that are sampled at a time."""

    def numbers(self) -> dict[str, int]:
        """Return its numbers for display and manifest."""
        numbers = {"micro_batch_tokens": self.tokens, "predicted_peak_bytes": self.predicted_peak_bytes}
        return {**numbers, "sampled_rows": self.sampled_rows} if self.sampled_rows else numbers


def find_device(machine: MachineConfig | None = None, *, ask_mlx: bool = False) -> Device:
    """Return the computing device and how much memory it may use.

    Args:
        machine: configured machine; None: the device that MLX chooses, without configured limits.
        ask_mlx: whether MLX may be imported, without which a CUDA device's memory is unknown.
    """
    machine = machine or _DEFAULT
    kind = device_kind(machine.device)
    plain = kind != "cpu" or os.environ.get("MLXCHAT_CPU") == "plain"
    limit, neighbours = machine.memory_limit_bytes, count_ranks(machine)[1]
    if limit is not None:
        where = "machine.memory_limit_bytes"
    elif (total := _memory_bytes(kind, ask_mlx=ask_mlx)) is None:
        where = "the device's memory"
    else:
        limit = int(total * MEMORY_SHARE[kind])
        where = f"{MEMORY_SHARE[kind]:.0%} of this machine's {format_bytes(total)}"
        if kind != "cuda" and neighbours > 1:  # on CUDA each has its own GPU
            limit //= neighbours
            where += f", shared by {neighbours} ranks"
    return Device(
        kind=kind, plain=plain, limit_bytes=limit, limit_is=where,
        num_lanes=1 if plain else min(machine.blas_threads or available_cores(), bounds.CPU_MOST_LANES),
        compute_bytes=2 if dtype_name(machine.device, machine.compute_dtype) == "bfloat16" else 4,
    )  # fmt: skip


def count_ranks(machine: MachineConfig) -> tuple[int, int]:
    """Return how many ranks compute together, and how many of them on this machine."""
    ranks = current()
    return (machine.num_processes,) * 2 if ranks is None else (ranks.size, ranks.on_host_of(0))


def choose_micro_batch(ctx: Context, training: Training) -> MicroBatch:
    """Return the micro-batch of a stage.

    A resumed training keeps its micro-batch while that fits, because rounding depends on it.

    Raises:
        ConfigError: it does not fit; with the predicted bytes and settings that would.
    """
    machine, row_tokens = ctx.config.machine, training.row_tokens
    training = replace(training.on(machine, ask_mlx=True), num_ranks=ctx.team.size if ctx.team is not None else 1)
    before = ctx.work / _CHOICE
    begun = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        begun = max(1, int(json.loads(before.read_text(encoding="utf-8"))["tokens"]) // row_tokens)
    if machine.device_batch_tokens is None and begun is not None and training.fits(min(training.own_rows, begun)):
        micro_rows = min(training.own_rows, begun)
    else:
        micro_rows = rows_at_a_time(training, machine)
    if micro_rows == 0:
        raise ConfigError(f"{ctx.step} {training.explain_excess()}")
    peak = predict_peak(training, micro_rows)
    found = MicroBatch(tokens=micro_rows * row_tokens, predicted_peak_bytes=peak.total, sampled_rows=peak.sampled_rows)
    before.parent.mkdir(parents=True, exist_ok=True)
    before.write_text(json.dumps({"tokens": found.tokens}), encoding="utf-8")
    return found


def rows_at_a_time(training: Training, machine: MachineConfig) -> int:
    """Return the rows of a micro-batch: the most that fit, within `machine.device_batch_tokens`; 0: none fits."""
    return training.micro_rows(machine.device_batch_tokens or MOST_TOKENS[training.device.kind])


def forward_tokens(machine: MachineConfig, sizes: GPTSizes, *, training_peak_bytes: int | None = None) -> int:
    """Return how many tokens an evaluation passes through the model at a time, within the limits of the machine.

    `training_peak_bytes` is the predicted peak of the training during which it is evaluated, which must stay the peak.
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


def memory_of(config: Config, stage: Stage, sizes: GPTSizes | None = None) -> Training | Decoding | None:
    """Return the memory needs that a stage's FORECAST describes; None: it describes none.

    Args:
        config: of the whole run.
        stage: what is to run.
        sizes: of its model; None: those of the configuration.

    Raises:
        ConfigError: the stage's adapters do not fit the model.
    """
    describe = getattr(stage.load_forecast(), "memory", None)
    if describe is None:
        return None
    sizes = sizes or sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    found: Training | Decoding = describe(config, stage.name, sizes)
    return found.on(config.machine)


def describe_memory(config: Config, plan: Iterable[PlannedStep]) -> dict[str, str]:
    """Return step → description of predicted peak and micro-batch, for the plan's pending trainings."""
    lines = {}
    for step, training in _needs(config, plan):
        if not isinstance(training, Training):
            continue
        rows = rows_at_a_time(training, config.machine)
        needed = f"{format_bytes(training.peak_bytes(rows or 1))} with {(rows or 1) * training.row_tokens:,} tokens"
        on_ranks = f" on each of {training.num_ranks} ranks" if training.num_ranks > 1 else ""
        lines[step.name] = f"{needed} at a time{on_ranks}" if rows else "does not fit"
    return lines


def check_memory(config: Config, plan: Iterable[PlannedStep]) -> None:
    """Refuse a plan with trainings or evaluations that do not fit.

    Raises:
        ConfigError: with each one's predicted peak, the limit, and the keys that lower it.
    """
    refused = []
    for step, need in _needs(config, plan):
        if isinstance(need, Decoding):
            try:
                need.rows(step.name)
            except ConfigError as error:
                refused.append(str(error))
        elif not rows_at_a_time(need, config.machine):
            refused.append(f"{step.name} {need.explain_excess()}")
    if refused:
        raise ConfigError("\n".join(refused))


def forecast_bytes(config: Config, plan: Iterable[PlannedStep]) -> dict[str, int]:
    """Return step → predicted peak of the plan's pending steps whose stages forecast it."""
    found = {}
    for step, need in _needs(config, plan):
        rows = rows_at_a_time(need, config.machine) if isinstance(need, Training) else need.rows(step.name)
        found[step.name] = need.peak_bytes(rows or 1)
    return found


def describe_conflicts(config: Config, plan: Iterable[PlannedStep]) -> list[str]:
    """Return a line with steps that could run at the same time but together exceed the memory."""
    plan, limit = list(plan), find_device(config.machine)
    if config.machine.max_parallel_steps < 2 or limit.limit_bytes is None:
        return []
    above: dict[str, set[str]] = {}
    for step in plan:
        above[step.name] = {step.name}.union(*(above[source] for source in step.inputs.values()))
    needs = forecast_bytes(config, plan)
    pairs = [
        f"{one} ({format_bytes(needs[one])}) and {other} ({format_bytes(needs[other])})"
        for one, other in combinations(needs, 2)
        if one not in above[other] and other not in above[one] and not limit.fits(needs[one] + needs[other])
    ]
    why = f"more than {format_bytes(limit.limit_bytes)} together ({limit.limit_is})"
    return [f"not at the same time, {why}: {'; '.join(pairs)}"] if pairs else []


def _needs(config: Config, plan: Iterable[PlannedStep]) -> list[tuple[PlannedStep, Training | Decoding]]:
    """Return the memory needs of the plan's pending steps."""
    plan = list(plan)
    given = find_given_sizes(config, plan)
    found = ((step, memory_of(step.config, step.stage, given.get(step.name))) for step in plan if not step.done)
    return [(step, need) for step, need in found if need is not None]


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
