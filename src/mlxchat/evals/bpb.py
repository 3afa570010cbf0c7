"""Bits per byte: a loss that does not depend on the tokenizer. Counterpart of nanochat/loss_eval.py.

Also the perplexity per token, which is comparable only between models with the same vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import Ints, Row, trim_rows
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.ops.device import make_lanes
from mlxchat.ops.loss import token_losses

if TYPE_CHECKING:
    from mlxchat.evals.language_model import LanguageModel

_LARGEST_EXPONENT = 700


@dataclass(frozen=True)
class TextLoss:
    """Sums of a model's loss over the targets that stand for bytes; special tokens are left out."""

    nats: float
    """Total cross-entropy."""
    num_bytes: int
    num_tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Infinite without bytes."""
        return self.nats / (math.log(2) * self.num_bytes) if self.num_bytes else math.inf

    @property
    def perplexity(self) -> float:
        """Per token: e to the mean cross-entropy in nats; infinite without tokens or on overflow."""
        mean = self.nats / self.num_tokens if self.num_tokens else math.inf
        return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf


def text_loss(
    model: GPT | LanguageModel, rows: list[Row], token_bytes: np.ndarray[Any, np.dtype[np.int32]], *, micro_tokens: int
) -> TextLoss:
    """Return the model's loss on the rows' targets.

    A target counts if it is not ignored and stands for bytes; special tokens stand for none and count neither in
    bits nor in bytes.

    Args:
        model: to evaluate; `rank_model.text_model` spreads it over all ranks.
        rows: inputs (T,) and targets (T,), −1 = ignored.
        token_bytes: (V,) raw bytes of each id, 0 for special tokens.
        micro_tokens: tokens per forward pass, at most.
    """
    nats, num_bytes, num_tokens = 0.0, 0, 0
    for losses, targets in _losses(model, rows, micro_tokens):
        weight = np.where(targets >= 0, token_bytes[np.maximum(targets, 0)], 0)
        nats += float((losses * (weight > 0)).sum(dtype=np.float64))
        num_bytes += int(weight.sum())
        num_tokens += int((weight > 0).sum())
    return TextLoss(nats, num_bytes, num_tokens)


def bits_per_byte(
    model: GPT | LanguageModel, rows: list[Row], token_bytes: np.ndarray[Any, np.dtype[np.int32]], *, micro_tokens: int
) -> float:
    """Return the model's bits per byte of the rows' targets, infinite if no byte counts; arguments as `text_loss`."""
    return text_loss(model, rows, token_bytes, micro_tokens=micro_tokens).bits_per_byte


def mean_loss(model: GPT | LanguageModel, rows: list[Row], *, micro_tokens: int) -> float:
    """Return the mean cross-entropy in nats over the rows' targets that are not ignored."""
    total, count = 0.0, 0
    for losses, targets in _losses(model, rows, micro_tokens):
        total += float(losses.sum(dtype=np.float64))
        count += int((targets >= 0).sum())
    return total / max(1, count)


def uniform_bits_per_byte(rows: list[Row], token_bytes: np.ndarray[Any, np.dtype[np.int32]]) -> float:
    """Return the bits per byte of the uniform distribution over tokens."""
    targets = np.concatenate([row[1] for row in rows])
    weight = np.where(targets >= 0, token_bytes[np.maximum(targets, 0)], 0)
    return float((weight > 0).sum() * math.log2(len(token_bytes)) / weight.sum())


def _losses(
    model: GPT | LanguageModel, rows: list[Row], micro_tokens: int
) -> list[tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int32]]]]:
    """Return loss and target of every token, flat, micro-batch by micro-batch."""
    per_pass = max(1, micro_tokens // len(rows[0][0])) if rows else 1
    batches = [
        trim_rows(*(np.stack([row[side] for row in rows[start : start + per_pass]]) for side in (0, 1)))
        for start in range(0, len(rows), per_pass)
    ]
    return [(losses_of(model, ids, targets).reshape(-1), targets.reshape(-1)) for ids, targets in batches]


def losses_of(model: GPT | LanguageModel, ids: Ints, targets: Ints) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the loss in nats of every target (B, T) after ids (B, T); 0 where a target is negative."""
    if not isinstance(model, GPT):
        return model.token_losses(ids, targets)
    return own_losses(model, ids, targets).reshape(targets.shape)


def own_losses(model: GPT, ids: Ints, targets: Ints) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the loss of every target (B T,) after ids (B, T), 0 where a target is negative, computed on all cores."""
    lanes, compiled_losses, weights = make_lanes(), _compiled_losses(model), flatten_parameters(model)
    deals = lanes.deal(len(ids))
    calls = [partial(compiled_losses, weights, mx.array(ids[deal]), mx.array(targets[deal])) for deal in deals]
    with lanes.sharing(len(deals)):
        losses = mx.concatenate(lanes.run(calls))
        mx.eval(losses)
    return np.asarray(losses)


def _compiled_losses(model: GPT) -> Callable[..., mx.array]:
    """Return weights, ids (B, T), targets (B, T) → losses (B T,), compiled once for a model."""

    def losses_of(weights: dict[str, mx.array], ids: mx.array, targets: mx.array) -> mx.array:
        own = flatten_parameters(model)
        set_parameters(model, weights)
        hidden = model.hidden(ids).reshape(-1, model.sizes.width)
        losses = token_losses(hidden, model.head_weight, targets.reshape(-1))
        set_parameters(model, own)
        return losses

    # Kept on the model so that both have the same lifetime; plain attributes are not parameters.
    kept: Callable[..., mx.array] = vars(model).setdefault("_compiled_losses", mx.compile(losses_of))
    return kept
