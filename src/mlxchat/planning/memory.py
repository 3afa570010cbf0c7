"""Memory of training, sampling and forward passes: predicted peaks, and the rows at a time that fit. Imports no MLX.

A training step peaks at one of four moments: when the backward pass begins (activations, logits, gradients of the
head), when it ends and its gradients are added to earlier ones, when the lanes' gradients are added up, or while the
optimizer moves the parameters. The factors were fitted to `mx.get_peak_memory()` (DECISIONS.md: the table);
tests/planning/test_memory.py compares predictions with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from mlxchat.adapter_problems import adapter_sizes_of
from mlxchat.config import Config, MachineConfig, OptimizerConfig
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
from mlxchat.planning.given import TeacherSize, find_given_sizes, measure_teacher, teacher_folder
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.progress import format_bytes
from mlxchat.tasks import task_class

if TYPE_CHECKING:
    from mlxchat.runner.context import Context

# Share of the device's memory that may be used. On a CPU the rest is for Python, the system and malloc's reserves; a
# Mac wires at most three quarters for its GPU; on CUDA the driver and MLX's kernels take some.
MEMORY_SHARE = {"cpu": 0.8, "metal": 0.7, "cuda": 0.9}
# Larger micro-batches were no faster per token on a CPU (DECISIONS.md); on GPUs what nanochat and the Mac
# configurations use.
MOST_TOKENS = {"cpu": 8192, "metal": 32768, "cuda": 65536}
_DEFAULT = MachineConfig(
    device="auto", compute_dtype="auto", memory_limit_bytes=None, blas_threads=None, num_processes=1
)
_CHOICE = "micro_batch.json"
_MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """How much a step keeps, in multiples of what is named."""

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
# Sums of the head's gradient for chunks that MLX begins ahead, of so many at most; Muon's copies if lanes share them.
_CPU_HEAD_PER_CHUNK, _CPU_MOST_HEADS, _CPU_MUON_OF_LANES = 0.4, 8, 8.5
# MLX's own operations, as on Metal and CUDA.
_PLAIN = _Factors(layer=(19.5, 6.0), ends=(17.0, 2.5), attention=5.0, logits=3.0, head=2.0, muon=1.05)
# With recomputation, what a layer keeps (its input and the residual's sum), and what lies outside of the layers while
# a layer is computed again.
_LAYER_INPUT, _PLAIN_RECOMPUTED_ENDS = 0.5, 9.0
# What a layer keeps besides for learnt residual scalars (the stream they scale) and for a gated value embedding.
_RESIDUAL, _VALUE_EMBEDDING = 1.0, 1.4
_TEACHER_LOGITS = 3.5  # further copies with a teacher: its logits and exponentials, softened ones, a product
# Layers' KV caches that are there twice: while they grow, or, by MLX's own operations, are written.
_CPU_GROWING, _PLAIN_GROWING = 1.0, 1.7
# Copies of the sampled rows' logits, and numbers per token and channel while a prompt is read.
_DRAWN_LOGITS, _READ = 3.0, 18.0
# Copies of the largest matrix that a lane has: unpacked; and as it is with its adapter, squared, for rows' lengths.
_UNPACKED, _LENGTHS = 1.5, 6.0
_ADAMW = 3  # a parameter and its two moments, old ones still there
_GROUP = 64  # packed numbers that share a scale and an offset


@dataclass(frozen=True, kw_only=True)
class Device:
    """What computes, and how much memory it may use."""

    kind: str = "cpu"
    """cpu, metal or cuda."""
    plain: bool = False
    """Whether MLX's own operations compute, not `mlxchat.cpu`."""
    num_lanes: int = 1
    """Streams that share a micro-batch's rows (`ops.device.Lanes`)."""
    compute_bytes: int = 4
    """Of a number that is computed with: 4 in float32, 2 in bfloat16."""
    limit_bytes: int | None = None
    """None: only MLX can tell."""
    limit_is: str = ""
    """Where the limit comes from, for people."""

    def most_rows(self, most: int, needed: Callable[[int], int]) -> int:
        """Return the most rows of a KV cache, up to `most`, whose needed bytes fit; 0: not even one."""
        sizes = sorted({most, *(rows for rows in bounds.BATCH_ROWS if rows < most)})
        limit = self.limit_bytes
        return max((rows for rows in sizes if limit is None or needed(rows) <= limit), default=0)


@dataclass(frozen=True, kw_only=True)
class PeakBytes:
    """What a training step holds, in bytes."""

    weights: int
    moments: int
    """The optimizer's state."""
    accumulated: int
    """Gradients of earlier micro-batches, one set for each lane."""
    activations: int
    """What the backward pass needs of the layers, attention's weights included."""
    logits: int
    """Of some chunks, and the gradients of the head."""
    gradients: int
    """Of all lanes, once the backward pass is done."""
    summing: int
    """They and their sum."""
    moving: int
    """The summed gradients and the optimizer's workspace."""
    kept: int = 0
    """The trained weights once more, where they are held twice, and those of a teacher."""
    sampling: int = 0
    """In RL: what answering needs, between the steps."""

    @property
    def while_sampling(self) -> int:
        """What is held between the steps of RL."""
        return self.weights + self.moments + self.kept + self.sampling

    @property
    def total(self) -> int:
        """The peak: weights, moments and what is kept, with what there is besides at the worst of these moments."""
        backward = self.accumulated + max(self.activations + self.logits, self.gradients)
        return self.weights + self.moments + self.kept + max(backward, self.summing, self.moving, self.sampling)


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
    """Whether layers keep their input alone (`machine.grad_checkpointing`)."""
    second_weights: bool = False
    """Whether the trained weights are held twice: the best so far, or RL's frozen reference."""
    teacher: TeacherSize | None = None
    """A frozen model whose distributions are learnt."""
    adapters: AdapterSizes | None = None
    """The only weights that are trained; None: all weights are."""
    sampled_rows: int = 0
    """In RL: answers that are sampled at a time, of as many tokens as a row."""
    num_ranks: int = 1
    """Processes that share an iteration's rows and the moments."""

    @property
    def own_rows(self) -> int:
        """Rows of an iteration that one rank has, at most."""
        return -(-self.rows // self.num_ranks)

    def peak_bytes(self, micro_rows: int) -> int:
        """Return the predicted peak with so many rows at a time."""
        return predict_peak(self, micro_rows).total

    def fits(self, micro_rows: int) -> bool:
        """Tell whether so many rows at a time fit, as far as is known."""
        return self.device.limit_bytes is None or self.peak_bytes(micro_rows) <= self.device.limit_bytes

    def micro_rows(self, most_tokens: int) -> int:
        """Return the rows of the largest micro-batch that fits and has at most `most_tokens`; 0: not even one row fits.

        Micro-batches of one size where that costs less than half of it; else as equal as can be.
        """
        most = max(1, min(self.own_rows, most_tokens // self.row_tokens))
        fitting = next((rows for rows in range(most, 0, -1) if self.fits(rows)), 0)
        if fitting == 0:
            return 0
        divisor = next(rows for rows in range(fitting, 0, -1) if self.own_rows % rows == 0)
        return divisor if 2 * divisor > fitting else -(-self.own_rows // -(-self.own_rows // fitting))

    def explain_excess(self, stage: str | None = None) -> str:
        """Return what the smallest possible step needs, the limit and, of a stage, keys that lower the need."""
        text = _excess(self.device, self.peak_bytes(1), f"one row of {self.row_tokens:,} tokens at a time")
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


# Predictions


def predict_peak(training: Training, micro_rows: int) -> PeakBytes:
    """Return what a training step with `micro_rows` rows at a time holds, within about 15 %."""
    sizes, device, adapters, teacher = training.sizes, training.device, training.adapters, training.teacher
    plain, compute_bytes, recompute = device.plain, device.compute_bytes, training.recompute
    rows, row_tokens, num_ranks = training.own_rows, training.row_tokens, training.num_ranks
    factors = _PLAIN if plain else _CPU
    counts = count_parameters(sizes)
    parameters, matrices = counts["total"], counts["matrices"]
    # A lane has whole gradients of its own but for the tables of embeddings, of which it makes the rows that it read.
    tables = counts["embedding"] + counts["value_embeddings"]
    muon = training.optimizer.kind == "muon"
    lanes = min(device.num_lanes, micro_rows)
    tokens = min(micro_rows, rows) * row_tokens
    states = tokens * sizes.width
    value_layers = sum(map(sizes.has_value_embedding, range(sizes.num_layers)))
    layer, ends = (numbers * compute_bytes + floats * 4 for numbers, floats in (factors.layer, factors.ends))
    residual = _RESIDUAL * compute_bytes * sizes.residual_scalars
    each = (_LAYER_INPUT * compute_bytes if recompute else layer) + residual
    kept = states * (sizes.num_layers * each + value_layers * _VALUE_EMBEDDING * compute_bytes)
    keys: float = row_tokens if plain else max(_mean_keys(row_tokens, window) for window in sizes.windows())
    attention = factors.attention * tokens * sizes.num_heads * keys * compute_bytes
    cast = parameters * compute_bytes if compute_bytes != _MASTER_BYTES else 0
    chunk_rows = (
        max(1, bounds.LOGITS // sizes.vocab_size)
        if plain
        else max(bounds.CPU_LEAST_LOGITS_ROWS, bounds.CPU_LOGITS // sizes.vocab_size)
    )
    at_once = min(tokens, chunk_rows if plain else _CPU_CHUNKS * chunk_rows)
    logits = (factors.logits + _TEACHER_LOGITS * (teacher is not None)) * at_once * sizes.vocab_size
    if adapters is None:  # else the head is frozen
        chunks = 0 if plain else lanes * -(-tokens // (lanes * chunk_rows))
        heads = factors.head * lanes + _CPU_HEAD_PER_CHUNK * min(chunks, _CPU_MOST_HEADS)
        logits += heads * counts["head"]
    logits *= _MASTER_BYTES
    # Shares of the matrices and tables move side by side, also where a micro-batch has fewer rows than there are lanes.
    workspace = _ADAMW * max(counts["embedding"], 4 * sizes.width**2) * min(device.num_lanes, 2 + value_layers)
    if muon:
        share = factors.muon if plain else min(factors.muon, _CPU_MUON_OF_LANES / device.num_lanes)
        workspace = max(workspace, round(matrices * share))
    gradients = (lanes * (parameters - tables) + tables) * _MASTER_BYTES
    if plain and recompute:
        # The logits are gone when layers are computed again, one at a time.
        again = states * (layer + _PLAIN_RECOMPUTED_ENDS * compute_bytes) + attention
        own = parameters if adapters is None else count_adapter_parameters(adapters, sizes)
        kept += max(states * ends, again + own * compute_bytes - logits)
    else:
        kept += states * ends + attention
    summing = gradients + (parameters if lanes > 1 else 0) * _MASTER_BYTES
    moving = (parameters + workspace) * _MASTER_BYTES
    if num_ranks > 1:
        whole = parameters * _MASTER_BYTES
        bucket = min(whole, max(bounds.BUCKET_BYTES, counts["embedding"] * _MASTER_BYTES))
        summing = max(summing, whole + 2 * bucket)
        # New weights come in before the old ones go; each rank's part is there once more, and as a message.
        arriving = min(whole, num_ranks * bucket) + 2 * whole // num_ranks
        moving = max(whole + workspace * _MASTER_BYTES // num_ranks, arriving)
    sampling = 0
    if training.sampled_rows:
        sampling = predict_sampling_bytes(
            sizes, device, rows=training.sampled_rows, row_tokens=row_tokens, cast=adapters is None and cast > 0
        )
    found = PeakBytes(
        weights=parameters * _MASTER_BYTES,
        moments=(matrices * (1 if muon else 2) + 2 * (parameters - matrices)) * _MASTER_BYTES // num_ranks,
        accumulated=gradients if rows > micro_rows else 0,
        activations=round(kept + cast) + (teacher.kept_per_token * tokens if teacher else 0),
        # The teacher's layers are done before there are logits.
        logits=max(round(logits), teacher.working_per_token * tokens if teacher else 0),
        gradients=gradients,
        summing=summing,
        moving=moving,
        kept=(parameters * _MASTER_BYTES if training.second_weights else 0) + (teacher.weights if teacher else 0),
        sampling=sampling,
    )
    if adapters is None:
        return found
    trained = count_adapter_parameters(adapters, sizes) * _MASTER_BYTES
    shapes = matrices_of(sizes)
    frozen, largest = parameters * compute_bytes, 4 * sizes.width**2 * compute_bytes
    besides = 0.0
    if adapters.bits is not None:
        numbers = sum(rows * columns for rows, columns in shapes.values())
        frozen += round(numbers * (adapters.bits / 8 + (2 / adapters.group_size - 1) * compute_bytes))
        besides += _UNPACKED * lanes * largest
    if adapters.kind == "dora":
        besides += _LENGTHS * lanes * largest
        # What is multiplied with rows' lengths, for their gradient; of c_fc it is kept anyway.
        columns = [shapes[name][0] for name in adapters.targets if not name.endswith("c_fc")]
        besides += tokens * compute_bytes * (max if recompute else sum)([0, *columns])
    return replace(
        found,
        weights=frozen + trained,
        moments=2 * trained // num_ranks,
        accumulated=lanes * trained if rows > micro_rows else 0,
        activations=found.activations - cast + round(besides),
        gradients=lanes * trained,
        summing=(lanes + (lanes > 1)) * trained,
        moving=(1 + _ADAMW) * trained,
        kept=(trained if training.second_weights else 0) + (teacher.weights if teacher else 0),
    )


def predict_sampling_bytes(
    sizes: GPTSizes,
    device: Device,
    *,
    rows: int,
    row_tokens: int,
    cast: bool = False,
    bits: int | None = None,
    kv_bits: int | None = None,
) -> int:
    """Return what the engine needs beside the weights: the KV cache, a prompt that is read, and a copy of the weights.

    Args:
        sizes: of the model.
        device: whose decoder copies the weights if it is `mlxchat.cpu`'s.
        rows: decoded at a time.
        row_tokens: prompt and answer, at most.
        cast: whether float32 weights are cast to the compute type meanwhile.
        bits: of the model's matrices; None: those of the compute type.
        kv_bits: of keys and values; None: those of the compute type.
    """
    counts = count_parameters(sizes)
    room = -(-row_tokens // bounds.KV_TOKENS) * bounds.KV_TOKENS
    held = [room if window is None else min(room, window + bounds.KV_TOKENS) for window in sizes.windows()]
    of_token = 2 * sizes.kv_width * _packed(kv_bits, device)
    # Beside the rows' past: layers' once more while they grow, or a prompt that is read, or logits in float32.
    growing = (_PLAIN_GROWING if device.plain else _CPU_GROWING) * of_token * rows * max(held)
    reading = _READ * min(row_tokens, bounds.PREFILL_TOKENS) * sizes.width + of_token * sizes.num_layers * row_tokens
    drawing = _DRAWN_LOGITS * rows * sizes.vocab_size * 4 / device.compute_bytes
    besides = max(growing, reading, drawing)
    copied = counts["total"] if cast else 0 if device.plain else _held(counts, bits, device) - counts["embedding"]
    return round((copied + of_token * rows * sum(held) + besides) * device.compute_bytes)


def _held(counts: dict[str, int], bits: int | None, device: Device) -> float:
    """Return the size of a model's weights in numbers of the compute type, with its matrices in so many bits."""
    products = counts["matrices"] + counts["head"]
    return counts["total"] - products + products * _packed(bits, device)


def _packed(bits: int | None, device: Device) -> float:
    """Return the size of a packed number, its share of scale and offset included, in numbers of the compute type."""
    return 1 if bits is None else bits / (8 * device.compute_bytes) + 2 / _GROUP


def predict_forward_bytes(sizes: GPTSizes, *, tokens: int, compute_bytes: int = 4) -> int:
    """Return about how much a forward pass with losses needs: the weights, a few layers' streams, the logits."""
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
    """What is computed at a time."""

    tokens: int
    predicted_peak_bytes: int
    sampled_rows: int = 0
    """Answers that are sampled at a time."""

    def numbers(self) -> dict[str, int]:
        """Return what is shown and recorded of it."""
        numbers = {"micro_batch_tokens": self.tokens, "predicted_peak_bytes": self.predicted_peak_bytes}
        return {**numbers, "sampled_rows": self.sampled_rows} if self.sampled_rows else numbers


def find_device(machine: MachineConfig | None = None, *, ask_mlx: bool = False) -> Device:
    """Return what will compute and how much memory it may use.

    Args:
        machine: what was asked for; None: the device that MLX chooses, without limits of its own.
        ask_mlx: whether MLX may be imported, without which a CUDA device's memory is not known.
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
        if kind != "cuda" and neighbours > 1:  # there each has a GPU of its own
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


def training_of(
    config: Config,
    stage: str,
    sizes: GPTSizes | None = None,
    *,
    device: Device | None = None,
    num_ranks: int | None = None,
    rows: int | None = None,
    row_tokens: int | None = None,
    teacher: TeacherSize | None = None,
) -> Training | None:
    """Return what the memory of a stage's training depends on; None: the stage does not train.

    Args:
        config: of the whole run, or the sections that the stage declares.
        stage: its name.
        sizes: of the model; None: those of the configuration.
        device: None: as `find_device` finds it without MLX.
        num_ranks: None: as the configuration says.
        rows: of an iteration, of a stage that is running; None: as far as the configuration says.
        row_tokens: the same.
        teacher: the same.

    Raises:
        ConfigError: its adapters do not fit the model.
    """
    if stage not in ("pretrain", "midtrain", "sft", "rl"):
        return None
    sizes = sizes or sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    device = device or find_device(config.machine)
    if row_tokens is None:
        row_tokens = bound_answers(config, sizes) if stage == "rl" else getattr(config, stage).batch.row_tokens
    if rows is None and stage == "rl":
        rows = config.rl.questions_per_iteration * config.rl.samples_per_question
    elif rows is None:
        tokens = None if stage == "pretrain" else getattr(config, stage).batch.tokens
        rows = (tokens or derive_hyperparameters(config, sizes).batch_tokens) // row_tokens
        if stage != "pretrain" and getattr(config, stage).teacher.is_there:
            folder = teacher_folder(getattr(config, stage).teacher, Path(config.outputs))
            teacher = None if folder is None else measure_teacher(folder)
    adapters = None
    if stage != "pretrain":
        adapters = adapter_sizes_of(f"{stage}.adapter", getattr(config, stage).adapter, sizes)
    training = Training(
        sizes=sizes, optimizer=config.optimizer, rows=max(1, rows), row_tokens=row_tokens, device=device,
        recompute=config.machine.grad_checkpointing, teacher=teacher, adapters=adapters,
        num_ranks=num_ranks or count_ranks(config.machine)[0],
        second_weights=(stage == "pretrain" and config.pretrain.keep == "best")
        or (stage == "rl" and config.rl.kl_coefficient > 0),
    )  # fmt: skip
    if stage != "rl":
        return training

    def while_sampling(rows: int) -> int:
        return predict_peak(replace(training, sampled_rows=rows), 1).while_sampling

    most = min(training.own_rows, bounds.DECODED_ROWS)
    return replace(training, sampled_rows=max(1, device.most_rows(most, while_sampling)))


def bound_answers(config: Config, sizes: GPTSizes) -> int:
    """Return the most tokens of a question and its answer in RL: as the task bounds its prompts, else the context.

    The stage measures the longest prompt and counts again.
    """
    limits = [task_class(item.task).prompt_tokens for item in (config.rl.task, config.rl.evaluation)]
    if None in limits:
        return sizes.context_tokens
    return max(limit for limit in limits if limit is not None) + config.rl.max_new_tokens


def choose_micro_batch(
    ctx: Context, sizes: GPTSizes, *, rows: int, row_tokens: int, teacher: TeacherSize | None = None
) -> MicroBatch:
    """Return what a stage computes at a time.

    A training that continues takes what it began with, as long as that fits: sums are rounded by micro-batch.

    Args:
        ctx: of the step.
        sizes: of its model.
        rows: of an iteration.
        row_tokens: of a row, at most.
        teacher: what a teacher holds, where one is learnt from.

    Raises:
        ConfigError: it does not fit; with the predicted bytes and settings that would.
    """
    machine = ctx.config.machine
    training = training_of(
        ctx.config, ctx.stage, sizes, rows=rows, row_tokens=row_tokens, teacher=teacher,
        device=find_device(machine, ask_mlx=True), num_ranks=ctx.team.size if ctx.team is not None else 1,
    )  # fmt: skip
    assert training is not None, "only stages that train choose a micro-batch"
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
    return training.micro_rows(machine.device_batch_tokens or MOST_TOKENS[training.device.kind])


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


def answers_at_a_time(
    what: str,
    device: Device,
    sizes: GPTSizes,
    *,
    row_tokens: int,
    most: int = bounds.DECODED_ROWS,
    bits: int | None = None,
    kv_bits: int | None = None,
    kept_tokens: int = 0,
    held_bytes: int = 0,
    remedy: str = "",
) -> int:
    """Return how many answers can be decoded at a time beside the model's weights, at most `most`.

    Args:
        what: needs the memory, for the message.
        device: what computes.
        sizes: of the model.
        row_tokens: prompt and answer, at most.
        most: that are wanted.
        bits: of the model's matrices; its own weights are freed once they are packed.
        kv_bits: of keys and values.
        kept_tokens: whose keys and values are kept for later prompts.
        held_bytes: what is in memory besides.
        remedy: what lowers the need, for the message.

    Raises:
        ConfigError: there is no room for a single one.
    """
    counts = count_parameters(sizes)
    weights = round(_held(counts, bits, device) * device.compute_bytes)
    loading = 0 if bits is None else weights + counts["total"] * device.compute_bytes
    kept = kept_tokens * sizes.num_layers * 2 * sizes.kv_width * _packed(kv_bits, device) * device.compute_bytes

    def needed(rows: int) -> int:
        sampling = predict_sampling_bytes(sizes, device, rows=rows, row_tokens=row_tokens, bits=bits, kv_bits=kv_bits)
        return max(loading, weights + round(kept) + sampling) + held_bytes

    if rows := device.most_rows(most, needed):
        return rows
    text = _excess(device, needed(1), f"its weights and one row of {row_tokens:,} tokens, prompt and answer")
    raise ConfigError(f"{what} {text}" + (f". To lower the need: {remedy}" if remedy else ""))


def answers_of_eval(step: str, device: Device, sizes: GPTSizes, max_new_tokens: int) -> int:
    """Return how many questions an evaluation answers at a time; prompts are cropped to the context.

    Raises:
        ConfigError: there is no room for a single one.
    """
    row_tokens = sizes.context_tokens + max_new_tokens
    return answers_at_a_time(step, device, sizes, row_tokens=row_tokens, remedy="a smaller eval.max_new_tokens")


def describe_memory(config: Config, plan: Iterable[PlannedStep]) -> dict[str, str]:
    """Return step → predicted peak and micro-batch of the plan's trainings that are to run, for people."""
    lines = {}
    for step, training in _trainings(config, list(plan)):
        rows = rows_at_a_time(training, config.machine)
        needed = f"{format_bytes(training.peak_bytes(rows or 1))} with {(rows or 1) * training.row_tokens:,} tokens"
        on_ranks = f" on each of {training.num_ranks} ranks" if training.num_ranks > 1 else ""
        lines[step.name] = f"{needed} at a time{on_ranks}" if rows else "does not fit"
    return lines


def check_memory(config: Config, plan: Iterable[PlannedStep]) -> None:
    """Refuse a plan with trainings or evaluations that cannot fit.

    Raises:
        ConfigError: with each one's predicted peak, the limit, and the keys that lower it.
    """
    plan = list(plan)
    refused = [
        f"{step.name} {training.explain_excess(step.stage.name)}"
        for step, training in _trainings(config, plan)
        if not rows_at_a_time(training, config.machine)
    ]
    given = find_given_sizes(config, plan)
    for step in plan:
        if step.stage.name != "eval" or step.done:
            continue
        sizes = given.get(step.name) or sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
        try:
            answers_of_eval(step.name, find_device(config.machine), sizes, config.eval.max_new_tokens)
        except ConfigError as error:
            refused.append(str(error))
    if refused:
        raise ConfigError("\n".join(refused))


def _trainings(config: Config, plan: list[PlannedStep]) -> list[tuple[PlannedStep, Training]]:
    """Return the plan's trainings that are to run."""
    given = find_given_sizes(config, plan)
    found = ((step, training_of(config, step.stage.name, given.get(step.name))) for step in plan if not step.done)
    return [(step, training) for step, training in found if training is not None]


def _excess(device: Device, needed_bytes: int, what: str) -> str:
    limit = format_bytes(device.limit_bytes or 0)
    return f"needs about {format_bytes(needed_bytes)} for {what}; the limit is {limit} ({device.limit_is})"


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
