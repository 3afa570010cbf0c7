"""One iteration: loss and gradients of its micro-batches, clipping, the optimizer's update; compiled per shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import Ints
from mlxchat.model.gpt import GPT
from mlxchat.model.weights import flatten_parameters, set_parameters
from mlxchat.ops.cross_entropy import cross_entropy_sum
from mlxchat.optim.groups import Flat, Optimizer, clip_gradients
from mlxchat.optim.schedule import Rates


@dataclass(frozen=True)
class Batch:
    """Rows of one iteration: ids (B, T), targets (B, T) with −1 where no loss is taken, weights (B, T).

    The loss is Σ weight × cross-entropy. With weights 1 / number of targets it is the mean over the iteration's
    tokens, whatever the micro-batches; in RL the weights are advantages.
    """

    ids: Ints
    targets: Ints
    weights: np.ndarray[Any, np.dtype[np.float32]]


def mean_batch(rows: Sequence[tuple[Ints, Ints]]) -> Batch:
    """Return rows as a batch whose loss is the mean over all their targets."""
    ids = np.stack([row[0] for row in rows])
    targets = np.stack([row[1] for row in rows])
    counted = targets >= 0
    return Batch(ids, targets, (counted / max(1, int(counted.sum()))).astype(np.float32))


class TrainStep:
    """Applies batches to a model and its optimizer. Shapes repeat, so each is compiled once."""

    def __init__(
        self, model: GPT, optimizer: Optimizer, *, micro_tokens: int, dtype: mx.Dtype, recompute: bool = False
    ) -> None:
        """Compile lazily.

        Args:
            model: float32 master weights, updated in place.
            optimizer: its state is updated in place.
            micro_tokens: tokens per micro-batch, at most; at least one row.
            dtype: what to compute in.
            recompute: whether a layer's activations are computed again instead of being kept for the gradient.
        """
        self.model, self.optimizer = model, optimizer
        self.micro_tokens, self.dtype, self.recompute = micro_tokens, dtype, recompute
        self.num_traces = 0
        state = [model.state, optimizer.state]
        self._whole = partial(mx.compile, inputs=state, outputs=state)(self._loss_and_update)
        self._part = partial(mx.compile, inputs=[model.state], outputs=[model.state])(self._loss_and_gradients)
        self._update = partial(mx.compile, inputs=state, outputs=state)(self._clip_and_update)

    def __call__(self, batch: Batch, rates: Rates[float]) -> tuple[float, float]:
        """Update the model; return the loss and the gradients' norm before clipping.

        If either is NaN or infinite, weights and optimizer stay as they were.
        """
        varying = Rates(*(mx.array(rate, dtype=mx.float32) for rate in rates))
        rows = max(1, self.micro_tokens // batch.ids.shape[1])
        if rows >= len(batch.ids):
            loss, norm = self._whole(*self._arrays(batch, slice(None)), varying)
        else:
            loss, gradients = self._part(*self._arrays(batch, slice(0, rows)))
            mx.eval(loss, gradients)
            for start in range(rows, len(batch.ids), rows):
                part, more = self._part(*self._arrays(batch, slice(start, start + rows)))
                loss = loss + part
                gradients = {name: gradients[name] + more[name] for name in more}
                # Evaluated here, so that only one micro-batch's graph is ever in memory.
                mx.eval(loss, gradients)
            norm = self._update(loss, gradients, varying)
        mx.eval(loss, norm, self.model.state, self.optimizer.state)
        return float(cast(float, loss.item())), float(cast(float, norm.item()))

    def _arrays(self, batch: Batch, rows: slice) -> tuple[mx.array, mx.array, mx.array]:
        return mx.array(batch.ids[rows]), mx.array(batch.targets[rows]), mx.array(batch.weights[rows])

    def _loss_and_gradients(self, ids: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, Flat]:
        self.num_traces += 1  # runs only while tracing
        parameters = flatten_parameters(self.model)

        def loss_of(masters: Flat) -> mx.array:
            set_parameters(self.model, {name: value.astype(self.dtype) for name, value in masters.items()})
            hidden = self.model.hidden(ids, recompute=self.recompute).reshape(-1, self.model.sizes.width)
            return cross_entropy_sum(
                hidden, self.model.head_weight, mx.maximum(targets, 0).reshape(-1), weights.reshape(-1)
            )

        loss, gradients = mx.value_and_grad(loss_of)(parameters)
        set_parameters(self.model, parameters)
        return loss, gradients

    def _clip_and_update(self, loss: mx.array, gradients: Flat, rates: Rates[mx.array]) -> mx.array:
        gradients, norm = clip_gradients(gradients, self.optimizer.config.grad_clip)
        parameters, state = flatten_parameters(self.model), dict(self.optimizer.state)
        new = self.optimizer.update(parameters, gradients, rates)
        # Inside the compiled step, since afterwards the old arrays are gone.
        is_finite = mx.isfinite(loss) & mx.isfinite(norm)
        set_parameters(self.model, {name: mx.where(is_finite, new[name], parameters[name]) for name in new})
        for name, before in state.items():
            self.optimizer.state[name] = mx.where(is_finite, self.optimizer.state[name], before)
        return norm

    def _loss_and_update(
        self, ids: mx.array, targets: mx.array, weights: mx.array, rates: Rates[mx.array]
    ) -> tuple[mx.array, mx.array]:
        loss, gradients = self._loss_and_gradients(ids, targets, weights)
        return loss, self._clip_and_update(loss, gradients, rates)
