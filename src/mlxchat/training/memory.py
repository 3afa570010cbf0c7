"""How many bytes a training step needs at its peak, in plain arithmetic, so that planning can ask without MLX.

A step peaks at one of three moments: between forward and backward pass (activations, logits, gradients of embedding and
head), when the lanes' gradients are added up, or while matrices move (Muon's workspace). What is kept for how long is
MLX's choice, so the factors below were fitted to `mx.get_peak_memory()` on a CPU (DECISIONS.md has the table);
tests/training/test_memory.py compares them with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxchat.model.sizing import GPTSizes, count_parameters
from mlxchat.optimizer_config import OptimizerConfig

_MASTER_BYTES = 4
# Numbers per token and channel between forward and backward: of each layer, of its input alone, outside of the layers.
_LAYER, _LAYER_INPUT, _ENDS = 18.3, 0.2, 17.7
# Copies of a lane's gradients of embedding and head at that moment.
_TABLES = 1.7
# Copies of a chunk's logits, and chunks of a lane that are there at once: one is not quite gone when the next begins.
_LOGITS, _CHUNKS_AT_ONCE = 3.2, 1.25
_CHUNK_FLOATS, _LEAST_CHUNK_ROWS = 1 << 22, 256  # of ops/cross_entropy.py
# Copies of the attention's weights of one layer: with few blocks MLX computes them all before it uses the first.
_ATTENTION, _MOST_BLOCKS = 1.5, 20
_BLOCK_TOKENS = 128  # of ops/attention.py
# Copies of the gradients when they are added up, and numbers per token and channel that are still there.
_SUM, _STILL_THERE = 1.06, 37.6
# Copies of all matrices in Muon's workspace, by variant; AdamW's is a table at a time.
_MUON = {"oct2025": 5.2, "jul2026": 3.4}


@dataclass(frozen=True, kw_only=True)
class PeakBytes:
    """What a training step holds, in bytes."""

    weights: int
    moments: int
    """The optimizer's state."""
    accumulated: int
    """Gradients of earlier micro-batches, one set for each lane."""
    activations: int
    """What the backward pass needs of the layers, and its first gradients."""
    attention: int
    """Scores and weights of one layer."""
    logits: int
    summing: int
    """Gradients of every lane and their sum, once the backward pass is done."""
    moving: int
    """The summed gradients and the optimizer's workspace."""

    @property
    def total(self) -> int:
        """The peak: weights and moments, with what there is besides at the worst of the three moments."""
        backward = self.accumulated + self.activations + self.attention + self.logits
        return self.weights + self.moments + max(backward, self.summing, self.moving)


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
    """
    counts = count_parameters(sizes)
    parameters, matrices = counts["total"], counts["matrices"]
    muon = optimizer.kind == "muon"
    lanes = min(num_lanes, micro_rows)
    tokens = min(micro_rows, rows) * row_tokens
    stream = tokens * sizes.width
    kept = stream * (sizes.num_layers * (_LAYER_INPUT if recompute else _LAYER) + _ENDS)
    tables = _TABLES * lanes * (counts["embedding"] + counts["head"])
    cast = parameters * compute_bytes if compute_bytes != _MASTER_BYTES else 0
    pairs = tokens * sizes.num_heads * (row_tokens + _BLOCK_TOKENS) / 2
    all_blocks = lanes * row_tokens / _BLOCK_TOKENS <= _MOST_BLOCKS
    chunk_rows = max(_LEAST_CHUNK_ROWS, _CHUNK_FLOATS // sizes.vocab_size)
    logits_rows = min(tokens, lanes * _CHUNKS_AT_ONCE * chunk_rows)
    workspace = matrices * _MUON[optimizer.variant] if muon else counts["embedding"]
    return PeakBytes(
        weights=parameters * _MASTER_BYTES,
        moments=(matrices * (1 if muon else 2) + 2 * (parameters - matrices)) * _MASTER_BYTES,
        accumulated=lanes * parameters * _MASTER_BYTES if rows > micro_rows else 0,
        activations=round(kept * compute_bytes + tables * _MASTER_BYTES + cast),
        attention=round(_ATTENTION * pairs * compute_bytes) if all_blocks else 0,
        logits=round(_LOGITS * logits_rows * sizes.vocab_size * _MASTER_BYTES),
        summing=round((lanes + 1) * _SUM * parameters * _MASTER_BYTES + _STILL_THERE * stream * compute_bytes),
        moving=round((parameters + workspace) * _MASTER_BYTES),
    )


def predict_forward_bytes(sizes: GPTSizes, *, tokens: int, compute_bytes: int = 4) -> int:
    """Return about how much a forward pass with losses needs: the weights, a few layers' streams, the logits."""
    weights = count_parameters(sizes)["total"] * _MASTER_BYTES
    return weights + round(tokens * (_ENDS * sizes.width * compute_bytes + _LOGITS * sizes.vocab_size * _MASTER_BYTES))
