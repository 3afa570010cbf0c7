"""How many bytes a training step needs at its peak, in plain arithmetic, so that planning can ask without MLX.

A step peaks at one of four moments: when the backward pass begins (activations, logits, gradients of the head), when it
ends and is added to earlier ones, when the lanes' gradients are added up, or while parameters move. MLX reserves an
operation's memory when it hands it to a lane, about a hundred operations ahead of what is computed, so that left alone
it holds up to a third more than is needed. `TrainStep` has it wait at what is predicted here: the prediction is a limit
too, between what cannot be freed and what MLX would take. The factors below follow from `mx.get_peak_memory()` on a
CPU, with that limit and without (DECISIONS.md); tests/planning/test_memory.py compares them with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlxchat.model.sizes import AdapterSizes, GPTSizes, count_adapter_parameters, count_parameters, matrices_of
from mlxchat.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    from mlxchat.planning.models import TeacherSize

_MASTER_BYTES = 4
# Numbers per token and channel when the backward pass begins: of each layer, of what is recomputed (its input and the
# residual's sums) and outside of the layers (embedding, final norm, its gradient, the first layers' ones on their way).
_LAYER, _LAYER_INPUT, _ENDS = 15.0, 0.5, 8.6
# What a layer keeps besides for learnt residual scalars (the stream they scale) and for a gated value embedding.
_RESIDUAL, _VALUE_EMBEDDING = 1.0, 1.4
# Copies of the attention's weights of one layer: in the gradient there are those of their gradient too, block by block.
_ATTENTION, _BLOCK_TOKENS = 1.5, 128  # the latter of ops/attention.py
# Copies of a chunk's logits (tanh, exponential, slope), and chunks that all lanes together have at once.
_LOGITS, _CHUNKS = 2.7, 3
_TEACHER_LOGITS = 3.5  # further ones with a teacher: its logits and exponentials, softened ones, a product
_CHUNK_FLOATS, _LEAST_CHUNK_ROWS = 1 << 22, 256  # of ops/cross_entropy.py
# Copies of the head's gradient of each lane, and sums of it for chunks handed out ahead, of so many at most.
_HEAD, _HEAD_PER_CHUNK, _MOST_HEADS = 1.1, 0.4, 8
# Copies of all matrices in Muon's workspace: 15 of the first stack, the square ones, which are a third of them. Handing
# out ahead ends before all of several lanes have all of theirs.
_MUON, _MUON_OF_ALL_LANES = 5.0, 8.5
# Rows that the engine decodes at a time, tokens by which its caches grow, tokens of a prompt that it reads at a time;
# copies of their logits (of the lanes, joined, drawn from), and numbers per token and channel while a prompt is read.
_DECODED_ROWS, _GROWTH_TOKENS, _READ_TOKENS = 32, 128, 512  # of engine/
_DRAWN_LOGITS, _READ = 3.0, 18.0
# Copies of the largest matrix that a lane has: unpacked; and as it is with its adapter, squared, for rows' lengths.
_UNPACKED, _LENGTHS = 1.5, 6.0
_ADAMW = 3  # a parameter and its two moments, old ones still there
# Bytes that travel between ranks at a time, at least one parameter; each lies there as it is and as a message.
_BUCKET = 64 * 2**20  # of distributed/group.py


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
    """The best weights so far, where they are kept, and those of a teacher."""
    sampling: int = 0
    """In RL: what answering needs, between the steps."""

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
    num_lanes: int,
    compute_bytes: int = 4,
    recompute: bool = False,
    keeps_best: bool = False,
    teacher: TeacherSize | None = None,
    samples: bool = False,
    num_ranks: int = 1,
    adapters: AdapterSizes | None = None,
) -> PeakBytes:
    """Return what a `TrainStep` needs, on a CPU within about 15 %; on a GPU, where it is not measured, roughly.

    Args:
        sizes: of the model.
        optimizer: its kind says which moments there are.
        rows: of an iteration.
        micro_rows: of a micro-batch.
        row_tokens: tokens of a row.
        num_lanes: streams that share a micro-batch's rows (`ops.lanes`).
        compute_bytes: of a number that is computed with: 4 in float32, 2 in bfloat16.
        recompute: whether layers keep their input alone (`machine.grad_checkpointing`).
        keeps_best: whether the best weights so far are kept beside the present ones (`pretrain.keep`).
        teacher: a frozen model whose distributions are learnt (`sft.teacher`).
        samples: whether rows are answers that the model gives between the steps.
        num_ranks: processes that share the iteration, of which this one has `rows`; each has its part of the moments.
        adapters: which alone are trained; None: all weights are.
    """
    counts = count_parameters(sizes)
    parameters, matrices = counts["total"], counts["matrices"]
    # A lane has whole gradients of its own but for the tables of embeddings, of which it makes the rows that it read.
    tables = counts["embedding"] + counts["value_embeddings"]
    muon = optimizer.kind == "muon"
    lanes = min(num_lanes, micro_rows)
    tokens = min(micro_rows, rows) * row_tokens
    value_layers = sum(map(sizes.has_value_embedding, range(sizes.num_layers)))
    layers = sizes.num_layers * ((_LAYER_INPUT if recompute else _LAYER) + _RESIDUAL * sizes.residual_scalars)
    kept = tokens * sizes.width * (layers + _VALUE_EMBEDDING * value_layers + _ENDS)
    keys = [_mean_keys(row_tokens, window) for window in sizes.windows()]
    kept += _ATTENTION * tokens * sizes.num_heads * max(keys)
    cast = parameters * compute_bytes if compute_bytes != _MASTER_BYTES else 0
    chunk_rows = max(_LEAST_CHUNK_ROWS, _CHUNK_FLOATS // sizes.vocab_size)
    chunks = lanes * -(-tokens // (lanes * chunk_rows))
    logits = _LOGITS * min(tokens, _CHUNKS * chunk_rows) * sizes.vocab_size
    if adapters is None:  # else the head is frozen
        logits += (_HEAD * lanes + _HEAD_PER_CHUNK * min(chunks, _MOST_HEADS)) * counts["head"]
    if teacher is not None:
        logits += _TEACHER_LOGITS * min(tokens, _CHUNKS * chunk_rows) * sizes.vocab_size
    # Shares of the matrices and tables move side by side, also where a micro-batch has fewer rows than there are lanes.
    workspace = _ADAMW * max(counts["embedding"], 4 * sizes.width**2) * min(num_lanes, 2 + value_layers)
    if muon:
        workspace = max(workspace, round(matrices * min(_MUON, _MUON_OF_ALL_LANES / num_lanes)))
    gradients = (lanes * (parameters - tables) + tables) * _MASTER_BYTES
    summing = gradients + (parameters if lanes > 1 else 0) * _MASTER_BYTES
    moving = (parameters + workspace) * _MASTER_BYTES
    if num_ranks > 1:
        whole = parameters * _MASTER_BYTES
        bucket = min(whole, max(_BUCKET, counts["embedding"] * _MASTER_BYTES))
        summing = max(summing, whole + 2 * bucket)
        # New weights come in before the old ones go; each rank's part is there once more, and as a message.
        arriving = min(whole, num_ranks * bucket) + 2 * whole // num_ranks
        moving = max(whole + workspace * _MASTER_BYTES // num_ranks, arriving)
    found = PeakBytes(
        weights=parameters * _MASTER_BYTES,
        moments=(matrices * (1 if muon else 2) + 2 * (parameters - matrices)) * _MASTER_BYTES // num_ranks,
        accumulated=gradients if rows > micro_rows else 0,
        activations=round(kept * compute_bytes + cast) + (teacher.kept_per_token * tokens if teacher else 0),
        # The teacher's layers are done before there are logits.
        logits=max(round(logits * _MASTER_BYTES), teacher.working_per_token * tokens if teacher else 0),
        gradients=gradients,
        summing=summing,
        moving=moving,
        kept=(parameters * _MASTER_BYTES if keeps_best else 0) + (teacher.weights if teacher else 0),
        sampling=predict_sampling_bytes(sizes, rows=rows, row_tokens=row_tokens) if samples else 0,
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
        kept=(trained if keeps_best else 0) + (teacher.weights if teacher else 0),
    )


def predict_sampling_bytes(sizes: GPTSizes, *, rows: int, row_tokens: int) -> int:
    """Return what the engine needs for answers, beside the weights: their arranged copy, the past of rows, a prompt.

    Args:
        sizes: of the model.
        rows: to answer; no more than 32 at a time.
        row_tokens: prompt and answer, at most.
    """
    counts = count_parameters(sizes)
    decoded = min(rows, _DECODED_ROWS)
    room = -(-row_tokens // _GROWTH_TOKENS) * _GROWTH_TOKENS
    held = [room if window is None else min(room, window + _GROWTH_TOKENS) for window in sizes.windows()]
    of_token = 2 * sizes.kv_width
    # Beside the rows' past: a layer's once more while its room grows, or a prompt that is read, or logits.
    growing = of_token * decoded * max(held)
    reading = _READ * min(row_tokens, _READ_TOKENS) * sizes.width + of_token * sizes.num_layers * row_tokens
    besides = max(growing, reading, _DRAWN_LOGITS * decoded * sizes.vocab_size)
    return round((counts["total"] - counts["embedding"] + of_token * decoded * sum(held) + besides) * _MASTER_BYTES)


def predict_forward_bytes(sizes: GPTSizes, *, tokens: int, compute_bytes: int = 4) -> int:
    """Return about how much a forward pass with losses needs: the weights, a few layers' streams, the logits."""
    weights = count_parameters(sizes)["total"] * _MASTER_BYTES
    return weights + round(
        tokens * ((_LAYER + _ENDS) * sizes.width * compute_bytes + _LOGITS * sizes.vocab_size * _MASTER_BYTES)
    )


def _mean_keys(tokens: int, window: int | None) -> float:
    """Return how many keys a token is multiplied with on average, in whole blocks."""
    stops = range(_BLOCK_TOKENS, tokens + _BLOCK_TOKENS, _BLOCK_TOKENS)
    return sum(min(stop, (tokens if window is None else window) + _BLOCK_TOKENS) for stop in stops) / len(stops)
