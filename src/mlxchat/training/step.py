"""One iteration: micro-batches → loss and gradients → their sums → update. Compiled once per shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from mlxchat.model.gpt import GPT
from mlxchat.model.lora import adapters_of
from mlxchat.model.parameters import (
    LookedUp,
    cast_parameters,
    flatten_parameters,
    module_at,
    set_parameters,
    trained_parameters,
)
from mlxchat.model.recompute import recomputed
from mlxchat.ops.device import compiled_method
from mlxchat.ops.dropout import Dropping, draw_keys, dropping
from mlxchat.ops.loss import cross_entropy_sum, distillation_sum
from mlxchat.optim.optimizer import Flat, Optimizer, Rates
from mlxchat.training.batches import Batch
from mlxchat.training.teacher import Distillation

Rows = dict[str, np.ndarray[Any, Any]]
"""Rows of a batch: ids, targets and weights (B, T), and with dropout keys (B, 2)."""

_LOSS_PARTS = ("ce", "kl")


class Gradients(NamedTuple):
    """Loss and gradients of some rows of a batch, in the dtype that they were computed in."""

    loss: mx.array  # scalar, or with a teacher (3,): total, ce and kl
    whole: Flat  # of all parameters but embeddings, by name
    # Of embeddings, by name: token ids (N,), and the gradients (N, C) of the rows that they read.
    read: dict[str, tuple[mx.array, mx.array]]


class Sums(NamedTuple):
    """Loss and gradients of all micro-batches so far."""

    loss: mx.array
    gradients: Flat


class Backward:
    """Computes the gradients of rows, a micro-batch at a time. Shapes repeat, so each is compiled once."""

    def __init__(
        self,
        model: GPT,
        *,
        micro_tokens: int,
        dtype: mx.Dtype,
        recompute: bool = False,
        dropout: float = 0.0,
        distillation: Distillation | None = None,
    ) -> None:
        """Compile lazily.

        Args:
            model: float32 master weights.
            micro_tokens: tokens per micro-batch, at most; at least one row.
            dtype: compute type.
            recompute: whether the backward pass computes a layer's activations again instead of keeping them.
            dropout: rate on the embedding and on what each attention and MLP adds; 0: none.
            distillation: a teacher whose distributions are learnt in addition to the targets.
        """
        self.model, self.distillation = model, distillation
        self.micro_tokens, self.dtype, self.recompute, self.dropout = micro_tokens, dtype, recompute, dropout
        self.num_traces = 0
        self.tables = {f"{name}.weight": name for name in model.tables()}
        """The embeddings: name of the parameter → name of the module."""
        self.trained = list(trained_parameters(model))
        self._gradients = compiled_method(self._loss_and_gradients)

    def sum_gradients(self, rows: Rows) -> Sums:
        """Return the loss of rows and its gradient in every trained parameter by name; nothing is changed."""
        parameters, size = flatten_parameters(self.model), self.micro_rows(rows["ids"].shape[1])
        # Broadcast, so that no zeros are in memory.
        tables = [name for name in self.tables if name in self.trained]
        sums = Sums(mx.array(0.0), {name: mx.broadcast_to(mx.array(0.0), parameters[name].shape) for name in tables})
        for start in range(0, len(rows["ids"]), size):
            mx.eval(sums)  # of the micro-batch before, so that one at a time is in memory
            part = {name: array[start : start + size] for name, array in rows.items()}
            sums = self.add_micro_batch(sums, part, parameters)
        return sums

    def micro_rows(self, row_tokens: int) -> int:
        """Return how many rows are computed at a time."""
        return max(1, self.micro_tokens // row_tokens)

    def add_micro_batch(self, sums: Sums, rows: Rows, parameters: Flat) -> Sums:
        """Return sums to which loss and gradients of a micro-batch are added."""
        loss, whole, read = self.gradients_of(rows, parameters)
        if sums.gradients.keys() >= whole.keys():
            whole = {name: _add(gradient, sums.gradients[name]) for name, gradient in whole.items()}
        for name, (ids, rows_read) in read.items():
            whole[name] = sums.gradients[name].at[ids].add(rows_read.astype(mx.float32))
        return Sums(sums.loss + loss, whole)

    def gradients_of(self, rows: Rows, parameters: Flat) -> Gradients:
        """Return loss and gradients of rows; a teacher computes its states outside the gradient's trace."""
        arrays = {name: mx.array(array) for name, array in rows.items()}
        if self.distillation is not None:
            arrays["seen"] = self.distillation.see(arrays["ids"])
        return self._gradients(parameters, arrays)

    def _loss_and_gradients(self, parameters: Flat, arrays: Flat) -> Gradients:
        """Return the loss and the gradients, of embeddings those of the rows that were read.

        An embedding is as large as all layers of a small model, and few of its rows are read: its whole gradient would
        be filled, kept and summed for each micro-batch.
        """
        self.num_traces += 1  # runs only while tracing
        model, ids, tables = self.model, arrays["ids"], self.tables
        model.run_layer = recomputed if self.recompute else GPT.run_layer
        inputs = {name: value[ids] if name in tables else value for name, value in parameters.items()}
        inputs = cast_parameters(inputs, self.dtype)
        before = {name: module_at(model, name) for name in tables.values()} | flatten_parameters(model)

        def loss_of(trained: Flat) -> tuple[mx.array, mx.array]:
            for name, value in {**inputs, **trained}.items():
                set_parameters(model, {tables[name]: LookedUp(value)} if name in tables else {name: value})
            with dropping(Dropping(self.dropout, arrays["keys"]) if "keys" in arrays else None):
                hidden = model.hidden(ids)
            return self._loss(hidden, arrays, frozen_head="lm_head.weight" not in trained)

        try:
            (_, loss), gradients = mx.value_and_grad(loss_of)({name: inputs[name] for name in self.trained})
        finally:
            set_parameters(model, before)
        read = {name: (ids.reshape(-1), flat(gradients.pop(name))) for name in tables if name in gradients}
        return Gradients(loss, gradients, read)

    def _loss(self, hidden: mx.array, arrays: Flat, *, frozen_head: bool) -> tuple[mx.array, mx.array]:
        """Return the loss, and the numbers to report: the loss alone, or with a teacher total, ce and kl."""
        head, targets, weights = self.model.head_weight, mx.maximum(arrays["targets"], 0), arrays["weights"]
        if self.distillation is not None:
            logits, mix = self.distillation.logits(arrays["seen"]), self.distillation.mix
            total, *parts = distillation_sum(hidden, head, targets, weights, logits, mix, frozen_head=frozen_head)
            return total, mx.stack([mx.stop_gradient(total), *parts])
        total = cross_entropy_sum(flat(hidden), head, targets.reshape(-1), weights.reshape(-1), frozen_head=frozen_head)
        return total, total


class TrainStep(Backward):
    """Applies batches to a model and its optimizer, both updated in place."""

    num_ranks = 1

    def __init__(self, model: GPT, optimizer: Optimizer, *, dropout_seed: int = 0, **settings: Any) -> None:
        """Take what `Backward` takes, and the seed of dropout: masks depend on it, iteration and row only."""
        super().__init__(model, **settings)
        self.optimizer, self._dropout_seed = optimizer, dropout_seed
        self.loss_parts: dict[str, float] = {}
        """With a teacher, of the last batch: ce, the mean cross-entropy, and kl, the mean divergence."""

    def __call__(
        self, batch: Batch, rates: Rates, iteration: int = 0, meanwhile: Callable[[], object] | None = None
    ) -> tuple[float, float]:
        """Update the model; return the loss and the gradients' norm before clipping.

        Only dropout depends on the iteration. If loss or norm is NaN or infinite, weights and optimizer stay as they
        were. `meanwhile` is called while the device computes.
        """
        loss, gradients = self.gradients(batch, iteration)
        norm = self.optimizer.update(self.model, gradients, rates, loss.reshape(-1)[0])
        numbers = mx.concatenate([norm.reshape(1), loss.reshape(-1)])
        mx.async_eval(numbers)
        if meanwhile is not None:
            meanwhile()
        length, result, *parts = cast(list[float], numbers.tolist())
        self.loss_parts = dict(zip(_LOSS_PARTS, parts, strict=False))
        return result, length

    def gradients(self, batch: Batch, iteration: int = 0) -> Sums:
        """Return the loss of a batch and its gradients; nothing is changed."""
        rows: Rows = {"ids": batch.ids, "targets": batch.targets, "weights": batch.weights}
        adapters = adapters_of(self.model)
        if self.dropout or (adapters is not None and adapters.dropout):
            rows["keys"] = draw_keys(self._dropout_seed, iteration, rows=len(batch.ids))
        return self.sum_gradients(rows)


@mx.compile
def _add(gradient: mx.array, total: mx.array) -> mx.array:
    return gradient.astype(mx.float32) + total.astype(mx.float32)


def flat(x: mx.array) -> mx.array:
    """Return x (B, T, C) as (N, C)."""
    return x.reshape(-1, x.shape[-1])
