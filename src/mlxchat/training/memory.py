"""How many bytes a training step needs at its peak, in plain arithmetic, so that planning can ask without MLX.

A step peaks either at the border of forward and backward pass (activations, logits, gradients of the tables) or in the
update (gradients of every lane, the optimizer's workspace). What is kept for how long is MLX's choice, so the factors
below were fitted to `mx.get_peak_memory()` on a CPU; tests/training/test_memory.py compares them with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxchat.model.sizing import GPTSizes, count_parameters
from mlxchat.optimizer_config import OptimizerConfig

_MASTER_BYTES = 4
# Numbers that live per token and channel: in each layer, in its input alone, and outside of the layers.
_LAYER, _LAYER_INPUT, _ENDS = 18.6, 1.7, 22.2
# Copies of the logits. Chunks need not wait for each other, so all of them may be there at once.
_LOGITS = 2.8
# Copies of the attention's weights of one layer: with few blocks MLX computes them all before it uses the first.
_ATTENTION, _MOST_BLOCKS_AT_ONCE = 4.8, 20
_BLOCK_TOKENS = 128  # of ops/attention.py
# The update's copies of matrices under Muon and of everything else, and of every further lane's gradients.
_MUON, _ADAMW, _LANE = 3.3, 1.7, 1.95


@dataclass(frozen=True, kw_only=True)
class PeakBytes:
    """What a training step holds, in bytes."""

    weights: int
    moments: int
    """The optimizer's state."""
    accumulated: int
    """Gradients of earlier micro-batches, one set for each lane."""
    gradients: int
    """Gradients of embedding, head and value embeddings while the backward pass begins."""
    activations: int
    attention: int
    """Scores and weights of one layer."""
    logits: int
    update: int
    """Everything besides weights and moments while the optimizer moves them: gradients, their sum, its workspace."""

    @property
    def backward(self) -> int:
        """Everything besides weights and moments where forward and backward pass meet."""
        return self.accumulated + self.gradients + self.activations + self.attention + self.logits

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.moments + max(self.backward, self.update)


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
    """Return what a `TrainStep` needs, within 15 % on a CPU; on a GPU, where it is not measured, roughly.

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
    others = parameters - matrices
    lanes = min(num_lanes, micro_rows)
    muon = optimizer.kind == "muon"
    tokens = min(micro_rows, rows) * row_tokens
    stream = tokens * sizes.width
    kept = stream * (sizes.num_layers * (_LAYER_INPUT if recompute else _LAYER) + _ENDS)
    pairs = tokens * sizes.num_heads * (row_tokens / 2 + _BLOCK_TOKENS / 2)
    at_once = lanes * row_tokens / _BLOCK_TOKENS <= _MOST_BLOCKS_AT_ONCE
    update = matrices * (_MUON if muon else _ADAMW) + others * _ADAMW + (lanes - 1) * _LANE * parameters
    copies = parameters * compute_bytes if compute_bytes != _MASTER_BYTES else 0
    return PeakBytes(
        weights=parameters * _MASTER_BYTES,
        moments=(matrices * (1 if muon else 2) + 2 * others) * _MASTER_BYTES,
        accumulated=lanes * parameters * _MASTER_BYTES if rows > micro_rows else 0,
        gradients=lanes * others * _MASTER_BYTES + copies,
        activations=round(kept * compute_bytes),
        attention=round(_ATTENTION * pairs * compute_bytes) if at_once and not recompute else 0,
        logits=round(_LOGITS * tokens * sizes.vocab_size * _MASTER_BYTES),
        update=round(update * _MASTER_BYTES),
    )


def predict_forward_bytes(sizes: GPTSizes, *, tokens: int, compute_bytes: int = 4) -> int:
    """Return about how much a forward pass with losses needs: the weights, a few layers' streams, the logits."""
    weights = count_parameters(sizes)["total"] * _MASTER_BYTES
    return weights + round(tokens * (_ENDS * sizes.width * compute_bytes + _LOGITS * sizes.vocab_size * _MASTER_BYTES))
