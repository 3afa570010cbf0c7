"""Scores of tokens, cross-entropy and divergence from a teacher, over the vocabulary, a chunk of positions at a time.

Logits are nanochat's: 15 tanh(x Wᵀ / 15), in float32. Products with the head are computed in the dtype of x, losses and
the sums of the head's gradient in float32. A loss computes its gradient in the forward pass, while a chunk's logits
exist, so the logits of all positions are never in memory.

Shapes: B rows, T positions, N tokens (of a chunk, or of all rows), C width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import mlx.core as mx

from mlxchat.config.schema import TeacherConfig
from mlxchat.ops.device import differentiable
from mlxchat.ops.machine import LOGITS

SOFT_CAP = 15.0

ScoreKind = Literal["losses", "entropies", "logits", "likeliest"]
"""Scores of a token: cross-entropy and the prediction's entropy in nats, its soft-capped logit, the likeliest id."""
Logits = Callable[[slice, list[mx.array]], mx.array]
"""(positions, from left to right, arrays to depend on) → the teacher's logits (N, V), float32."""
OfChunk = Callable[[slice, mx.array, list[mx.array]], tuple[list[mx.array], mx.array]]
"""(positions, their logits (N, V), arrays to depend on) → sums, of which the first is the loss; its gradient in the
logits (N, V)."""
Found = tuple[list[mx.array], list[mx.array], mx.array | None]
"""Sums, of which the first is the loss; its gradients in x, per chunk of positions, and in the head."""


def capped_logits(x: mx.array, weight: mx.array) -> mx.array:
    """Return 15 tanh(x Wᵀ / 15) (N, V) in float32."""
    return SOFT_CAP * mx.tanh((x @ weight.T).astype(mx.float32) / SOFT_CAP)


def split_positions(x: mx.array, rows: int) -> list[slice]:
    """Return slices of the positions of x (B, T, C), each with about `rows` tokens of all rows together."""
    size = max(1, rows // x.shape[0])
    return [slice(start, min(start + size, x.shape[1])) for start in range(0, x.shape[1], size)]


def token_scores(x: mx.array, weight: mx.array, targets: mx.array, kinds: Sequence[ScoreKind]) -> list[mx.array]:
    """Return an array (N,) for each kind of score, 0 where the target is negative. Not meant for gradients.

    Shapes: final hidden states x (N, C), output head `weight` (V, C), targets (N,).
    """
    chunks: list[list[mx.array]] = []
    for rows in split_positions(x[None], LOGITS // len(weight)):
        found = scores_of_logits(capped_logits(x[rows], weight), mx.maximum(targets[rows], 0), kinds)
        chunks.append([mx.where(targets[rows] >= 0, each, 0) for each in found])
    return [mx.concatenate(list(parts)) for parts in zip(*chunks, strict=True)]


def scores_of_logits(logits: mx.array, targets: mx.array, kinds: Sequence[ScoreKind]) -> list[mx.array]:
    """Return an array (N,) for each kind of score of float32 logits (N, V) and targets (N,)."""
    log_sums, chosen = mx.logsumexp(logits, axis=-1), mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    # Only what is returned is computed.
    found: dict[ScoreKind, mx.array] = {
        "losses": log_sums - chosen,
        "entropies": log_sums - (mx.exp(logits - log_sums[:, None]) * logits).sum(-1),
        "logits": chosen,
        "likeliest": logits.argmax(-1),
    }
    return [found[kind] for kind in kinds]


# Losses with gradients


def cross_entropy_sum(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array, *, frozen_head: bool = False
) -> mx.array:
    """Return the weighted sum of the tokens' cross-entropy (scalar, nats), differentiable in x and weight.

    Shapes: final hidden states x (N, C), output head `weight` (V, C), targets (N,), not negative, and the factors of
    their losses `row_weights` (N,): 0 ignores a token, and advantages of RL may be negative. `frozen_head` skips the
    gradient of the head, which takes a quarter of the time.
    """

    def of_chunk(part: slice, logits: mx.array, after: list[mx.array]) -> tuple[list[mx.array], mx.array]:
        factor = row_weights[part, None]
        losses, slope = _cross_entropy(logits, targets[part, None])
        return [(factor * losses).sum()], factor * slope

    return _over_chunks(x[None], weight, of_chunk, frozen_head=frozen_head)[0]


def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the losses (N, 1) of targets (N, 1), and their gradients (N, V) in the logits."""
    log_sums = mx.logsumexp(logits, axis=-1, keepdims=True)
    losses = log_sums - mx.take_along_axis(logits, targets, axis=-1)
    return losses, mx.exp(logits - log_sums) - (mx.arange(logits.shape[1]) == targets)


def distillation_sum(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array, teacher: Logits, mix: TeacherConfig, *,
    frozen_head: bool = False,
) -> tuple[mx.array, ...]:  # fmt: skip
    """Return (1 − w) × cross-entropy + w T² × KL(teacher, student), differentiable in x and weight, then both parts.

    Shapes: the student's final hidden states x (B, T, C) and output head `weight` (V, C), targets and `row_weights`
    (B, T) as in `cross_entropy_sum`. `mix` has the share w of the divergence, and the temperature T.
    """

    def of_chunk(part: slice, logits: mx.array, after: list[mx.array]) -> tuple[list[mx.array], mx.array]:
        factor = row_weights[:, part].reshape(-1, 1)
        ce, slope_of_ce = _cross_entropy(logits, targets[:, part].reshape(-1, 1))
        kl, slope_of_kl = _divergence(teacher(part, after) / mix.temperature, logits / mix.temperature)
        share, scale = 1 - mix.weight, mix.weight * mix.temperature
        sums = [(factor * each).sum() for each in (share * ce + scale * mix.temperature * kl, ce, kl)]
        return sums, factor * (share * slope_of_ce + scale * slope_of_kl)

    return _over_chunks(x, weight, of_chunk, frozen_head=frozen_head)


def _divergence(theirs: mx.array, ours: mx.array) -> tuple[mx.array, mx.array]:
    """Return KL(p, q) of softmax(theirs) and softmax(ours) (N, 1), and its gradient in `ours` (N, V)."""
    log_p, log_q = (logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (theirs, ours))
    p = mx.exp(log_p)
    return (p * (log_p - log_q)).sum(-1, keepdims=True), mx.exp(log_q) - p


def _over_chunks(x: mx.array, weight: mx.array, of_chunk: OfChunk, *, frozen_head: bool) -> tuple[mx.array, ...]:
    """Return the sums over all positions, of which the first is differentiable in x (B, T, C) and weight (V, C)."""

    def compute(x: mx.array, weight: mx.array) -> Found:
        sums, d_x, d_weight, done = list[mx.array](), list[mx.array](), None, list[mx.array]()
        for part in split_positions(x, LOGITS // len(weight)):
            # Depend on the previous chunk: otherwise MLX would compute the logits of all chunks first.
            (rows,) = mx.depends([x[:, part].reshape(-1, x.shape[2])], done)
            logits = capped_logits(rows, weight)
            found, slope = of_chunk(part, logits, done)
            slope = (slope * (1 - mx.square(logits / SOFT_CAP))).astype(x.dtype)
            sums = [total + more for total, more in zip(sums, found, strict=True)] if sums else found
            d_x.append(slope @ weight)
            done = [*sums, d_x[-1]]
            if not frozen_head:
                d_rows = (slope.T @ rows).astype(mx.float32)
                d_weight = d_rows if d_weight is None else d_weight + d_rows
                done.append(d_weight)
        return sums, d_x, d_weight

    return with_gradients(compute, x, weight, frozen_head=frozen_head)


def with_gradients(
    compute: Callable[[mx.array, mx.array], Found], x: mx.array, weight: mx.array, *, frozen_head: bool
) -> tuple[mx.array, ...]:
    """Return what `compute` sums over x (B, T, C); the first sum has the gradients that it found."""
    inputs = [x] if frozen_head else [x, weight]

    @differentiable
    def outputs_of(*inputs: mx.array) -> list[mx.array]:
        sums, d_x, d_weight = compute(inputs[0], weight if frozen_head else inputs[1])
        whole = mx.concatenate([each.reshape(len(x), -1, x.shape[2]) for each in d_x], axis=1)
        return [*sums, whole] if d_weight is None else [*sums, whole, d_weight]

    @outputs_of.vjp
    def gradients(primals: object, cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        found = outputs[-len(inputs) :]
        return [(each * cotangents[0]).astype(given.dtype) for each, given in zip(found, inputs, strict=True)]

    loss, *others = outputs_of(*inputs)[: -len(inputs)]
    return loss, *map(mx.stop_gradient, others)
