"""Peak memory of training, sampling and forward passes, by arithmetic on sizes. Imports no MLX.

A training step peaks at one of four moments: when the backward pass begins (activations, logits, gradients of the
head), when it ends and its gradients are added to earlier ones, when the lanes' gradients are added up, or while the
optimizer moves the parameters. The factors were fitted to `mx.get_peak_memory()` (DECISIONS.md: the table);
tests/planning/test_memory.py compares predictions with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlxchat.model.sizes import AdapterSizes, GPTSizes, count_adapter_parameters, count_parameters, matrices_of
from mlxchat.ops.machine import (
    BUCKET_BYTES,
    CPU_ATTENTION_TOKENS,
    CPU_LEAST_LOGITS_ROWS,
    CPU_LOGITS,
    KV_TOKENS,
    LOGITS,
    PREFILL_TOKENS,
)
from mlxchat.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    from mlxchat.planning.models import TeacherSize

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


def predict_peak_bytes(
    sizes: GPTSizes,
    optimizer: OptimizerConfig,
    *,
    rows: int,
    micro_rows: int,
    row_tokens: int,
    num_lanes: int = 1,
    compute_bytes: int = 4,
    plain: bool = False,
    recompute: bool = False,
    second_weights: bool = False,
    teacher: TeacherSize | None = None,
    sampled_rows: int = 0,
    num_ranks: int = 1,
    adapters: AdapterSizes | None = None,
) -> PeakBytes:
    """Return what a `TrainStep` needs, within about 15 %.

    Args:
        sizes: of the model.
        optimizer: its kind says which moments there are.
        rows: of an iteration.
        micro_rows: of a micro-batch.
        row_tokens: tokens of a row.
        num_lanes: streams that share a micro-batch's rows (`ops.lanes`).
        compute_bytes: of a number that is computed with: 4 in float32, 2 in bfloat16.
        plain: whether MLX's own operations compute, as on GPUs, instead of the CPU's kernels.
        recompute: whether layers keep their input alone (`machine.grad_checkpointing`).
        second_weights: whether the trained weights are held twice: the best so far, or RL's frozen reference.
        teacher: a frozen model whose distributions are learnt (`sft.teacher`).
        sampled_rows: answers that are sampled at a time, of as many tokens as a row; 0: none.
        num_ranks: processes that share the iteration, of which this one has `rows`; each has its part of the moments.
        adapters: the only weights that are trained; None: all weights are.
    """
    factors = _PLAIN if plain else _CPU
    counts = count_parameters(sizes)
    parameters, matrices = counts["total"], counts["matrices"]
    # A lane has whole gradients of its own but for the tables of embeddings, of which it makes the rows that it read.
    tables = counts["embedding"] + counts["value_embeddings"]
    muon = optimizer.kind == "muon"
    lanes = min(num_lanes, micro_rows)
    tokens = min(micro_rows, rows) * row_tokens
    states = tokens * sizes.width
    value_layers = sum(map(sizes.has_value_embedding, range(sizes.num_layers)))
    layer, ends = (numbers * compute_bytes + floats * 4 for numbers, floats in (factors.layer, factors.ends))
    residual = _RESIDUAL * compute_bytes * sizes.residual_scalars
    each = (_LAYER_INPUT * compute_bytes if recompute else layer) + residual
    kept = states * (sizes.num_layers * each + value_layers * _VALUE_EMBEDDING * compute_bytes)
    if plain:
        keys: float = row_tokens
    else:
        keys = max(_mean_keys(row_tokens, window) for window in sizes.windows())
    attention = factors.attention * tokens * sizes.num_heads * keys * compute_bytes
    cast = parameters * compute_bytes if compute_bytes != _MASTER_BYTES else 0
    at_once, chunks = tokens, 1
    if not plain:
        chunk_rows = max(CPU_LEAST_LOGITS_ROWS, CPU_LOGITS // sizes.vocab_size)
        at_once, chunks = min(tokens, _CPU_CHUNKS * chunk_rows), lanes * -(-tokens // (lanes * chunk_rows))
    else:
        at_once = min(tokens, max(1, LOGITS // sizes.vocab_size))
    logits = (factors.logits + _TEACHER_LOGITS * (teacher is not None)) * at_once * sizes.vocab_size
    if adapters is None:  # else the head is frozen
        logits += factors.head * lanes * counts["head"]
        logits += 0 if plain else _CPU_HEAD_PER_CHUNK * min(chunks, _CPU_MOST_HEADS) * counts["head"]
    logits *= _MASTER_BYTES
    # Shares of the matrices and tables move side by side, also where a micro-batch has fewer rows than there are lanes.
    workspace = _ADAMW * max(counts["embedding"], 4 * sizes.width**2) * min(num_lanes, 2 + value_layers)
    if muon:
        share = factors.muon if plain else min(factors.muon, _CPU_MUON_OF_LANES / num_lanes)
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
        bucket = min(whole, max(BUCKET_BYTES, counts["embedding"] * _MASTER_BYTES))
        summing = max(summing, whole + 2 * bucket)
        # New weights come in before the old ones go; each rank's part is there once more, and as a message.
        arriving = min(whole, num_ranks * bucket) + 2 * whole // num_ranks
        moving = max(whole + workspace * _MASTER_BYTES // num_ranks, arriving)
    sampling = 0
    if sampled_rows:
        sampling = predict_sampling_bytes(
            sizes, rows=sampled_rows, row_tokens=row_tokens, compute_bytes=compute_bytes, plain=plain,
            cast=adapters is None and cast > 0,
        )  # fmt: skip
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
        kept=(parameters * _MASTER_BYTES if second_weights else 0) + (teacher.weights if teacher else 0),
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
        kept=(trained if second_weights else 0) + (teacher.weights if teacher else 0),
    )


def predict_sampling_bytes(
    sizes: GPTSizes, *, rows: int, row_tokens: int, compute_bytes: int = 4, plain: bool = False, cast: bool = False
) -> int:
    """Return what the engine needs beside the weights: the KV cache, a prompt that is read, and a copy of the weights.

    Args:
        sizes: of the model.
        rows: decoded at a time.
        row_tokens: prompt and answer, at most.
        compute_bytes: of a number that is computed with, and kept of keys and values.
        plain: as for `predict_peak_bytes`; the CPU's decoder arranges the weights in a copy.
        cast: whether float32 weights are cast to the compute type meanwhile.
    """
    counts = count_parameters(sizes)
    room = -(-row_tokens // KV_TOKENS) * KV_TOKENS
    held = [room if window is None else min(room, window + KV_TOKENS) for window in sizes.windows()]
    of_token = 2 * sizes.kv_width
    # Beside the rows' past: layers' once more while they grow, or a prompt that is read, or logits in float32.
    growing = (_PLAIN_GROWING if plain else _CPU_GROWING) * of_token * rows * max(held)
    reading = _READ * min(row_tokens, PREFILL_TOKENS) * sizes.width + of_token * sizes.num_layers * row_tokens
    drawing = _DRAWN_LOGITS * rows * sizes.vocab_size * 4 / compute_bytes
    besides = max(growing, reading, drawing)
    copied = counts["total"] if cast else 0 if plain else counts["total"] - counts["embedding"]
    return round((copied + of_token * rows * sum(held) + besides) * compute_bytes)


def predict_forward_bytes(sizes: GPTSizes, *, tokens: int, compute_bytes: int = 4) -> int:
    """Return about how much a forward pass with losses needs: the weights, a few layers' streams, the logits."""
    weights = count_parameters(sizes)["total"] * _MASTER_BYTES
    streams = (_CPU.layer[0] + _CPU.ends[0]) * sizes.width * compute_bytes
    return weights + round(tokens * (streams + _CPU.logits * sizes.vocab_size * _MASTER_BYTES))


def _mean_keys(tokens: int, window: int | None) -> float:
    """Return how many keys a token is multiplied with on average, in whole blocks."""
    stops = range(CPU_ATTENTION_TOKENS, tokens + CPU_ATTENTION_TOKENS, CPU_ATTENTION_TOKENS)
    return sum(min(stop, (tokens if window is None else window) + CPU_ATTENTION_TOKENS) for stop in stops) / len(stops)
