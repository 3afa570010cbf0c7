"""What quantising costs a model, and a refusal where it costs too much."""

from __future__ import annotations

import math

from mlxchat.data.packing import Row
from mlxchat.engine.quantise import rounded
from mlxchat.errors import DataError
from mlxchat.evals.bpb import mean_loss
from mlxchat.model.gpt import GPT
from mlxchat.model.weights import flatten_parameters, set_parameters

MOST_CHANGE = 0.2
"""Nats per token beyond which the rounded model is another one."""
_MICRO_TOKENS = 2048


def rounded_copy(model: GPT, bits: int) -> GPT:
    """Return a copy whose weights are the numbers that decoding with `bits` multiplies with."""
    copy, weights = GPT(model.sizes), flatten_parameters(model)
    for name, weight in weights.items():
        if _is_quantised(name):
            weights[name] = rounded(weight, bits)
    set_parameters(copy, weights)
    return copy


def loss_change(model: GPT, bits: int, rows: list[Row]) -> float:
    """Return by how many nats per token the loss on rows is higher with weights of `bits`."""
    exact, rounded = (mean_loss(each, rows, micro_tokens=_MICRO_TOKENS) for each in (model, rounded_copy(model, bits)))
    return rounded - exact


def check_quantised(model: GPT, bits: int, rows: list[Row], *, most: float = MOST_CHANGE) -> float:
    """Return `loss_change`.

    Raises:
        DataError: it is no number, or more than `most`: what the model says with such weights is another model's.
    """
    change = loss_change(model, bits, rows)
    if not math.isfinite(change) or change > most:
        told = f"{change:+.2f} nats per token" if math.isfinite(change) else "no finite loss"
        instead = "Use 8 bits or none" if bits < 8 else "Leave its weights as they are"
        raise DataError(
            f"this model does not bear weights of {bits} bits: {told} on {len(rows)} rows; most is {most:+.2f}. "
            f"{instead}"
        )
    return change


def _is_quantised(name: str) -> bool:
    return name.endswith(("c_q.weight", "c_k.weight", "c_v.weight", "c_proj.weight", "c_fc.weight", "lm_head.weight"))
