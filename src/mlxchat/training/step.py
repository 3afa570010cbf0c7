"""One iteration: micro-batches → loss and gradients → their sums → clipping and update. Compiled once per shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxchat.distributed.group import ALONE, Group
from mlxchat.model.gpt import (
    GPT,
    LookedUp,
    cast_parameters,
    flatten_parameters,
    module_at,
    set_parameters,
    trained_parameters,
)
from mlxchat.model.lora import adapters_of
from mlxchat.ops.device import accelerated, compiled, make_lanes
from mlxchat.ops.dropout import Dropping, draw_keys, dropping
from mlxchat.ops.loss import cross_entropy_sum, distillation_sum
from mlxchat.optim.optimizer import Flat, Optimizer, Rates
from mlxchat.optim.sharding import Sharding
from mlxchat.training.batches import Batch
from mlxchat.training.gradients import Gradients, GradientSums
from mlxchat.training.teacher import Distillation

_LOSS_PARTS = ("ce", "kl")


class TrainStep:
    """Applies batches to a model and its optimizer. Shapes repeat, so each is compiled once."""

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        *,
        micro_tokens: int,
        dtype: mx.Dtype,
        recompute: bool = False,
        dropout: float = 0.0,
        dropout_seed: int = 0,
        distillation: Distillation | None = None,
        group: Group = ALONE,
    ) -> None:
        """Compile lazily.

        Args:
            model: float32 master weights, updated in place.
            optimizer: its state is updated in place.
            micro_tokens: tokens per micro-batch of a rank, at most; at least one row.
            dtype: compute type.
            recompute: whether the backward pass computes a layer's activations again instead of keeping them.
            dropout: rate on the embedding and on what each attention and MLP adds; 0: none.
            dropout_seed: a row's mask depends on it, the iteration and the row's number only.
            distillation: a teacher whose distributions are learnt in addition to the targets.
            group: ranks that compute this step together. Each gets equal weights and the whole batch, computes its
                rows, and updates its part of the parameters with the sums over all ranks.
        """
        self.model, self.optimizer, self.distillation = model, optimizer, distillation
        self.micro_tokens, self.dtype, self.recompute = micro_tokens, dtype, recompute
        self.dropout, self._dropout_seed = dropout, dropout_seed
        self.loss_parts: dict[str, float] = {}
        """With a teacher, of the last batch: ce, the mean cross-entropy, and kl, the mean divergence."""
        self.num_traces = 0
        self.group = group
        self.sharding = Sharding(group, optimizer) if group.size > 1 else None
        """Which rank updates which parameters; None: this process updates all."""
        self.lanes = make_lanes()
        self._shares = optimizer.share(len(self.lanes))
        self._gradients = compiled(self._loss_and_gradients)

    def __call__(self, batch: Batch, rates: Rates[float], iteration: int = 0) -> tuple[float, float]:
        """Update the model; return the loss and the gradients' norm before clipping.

        Only dropout depends on the iteration. If loss or norm is NaN or infinite, weights and optimizer stay as they
        were.
        """
        with step_context(self, batch):
            loss, gradients, norm = self._sum_gradients(batch, iteration)
            result, *parts = cast(list[float], loss.reshape(-1).tolist())
            self.loss_parts = dict(zip(_LOSS_PARTS, parts, strict=False))
            length = float(cast(float, norm.item()))
            if math.isfinite(result) and math.isfinite(length):
                self._update(gradients, norm, rates)
        return float(result), length

    def gradients(self, batch: Batch, iteration: int = 0) -> tuple[mx.array, Flat]:
        """Return the loss and the gradient of every parameter by name, before clipping; nothing is changed."""
        loss, gradients, _ = self._sum_gradients(batch, iteration)
        return loss, gradients

    def micro_rows(self, batch: Batch) -> int:
        """Return how many rows of a batch a rank computes at a time."""
        return max(1, self.micro_tokens // int(batch.ids.shape[1]))

    def _sum_gradients(self, batch: Batch, iteration: int) -> tuple[mx.array, Flat, mx.array]:
        """Return the batch's loss, gradients and norm; with several ranks, the gradients of this rank's part."""
        parameters = flatten_parameters(self.model)
        sums = GradientSums(self.lanes, self._shares, self.optimizer.shapes)
        for arrays in self._micro_batches(batch, iteration):
            calls = [
                partial(self._gradients, parameters, *(mx.array(array[rows]) for array in arrays))
                for rows in self.lanes.deal(len(arrays[0]))
            ]
            sums.add(self.lanes.run(calls))
        loss, gradients, norm = sums.total()
        if self.sharding is None:
            return loss, gradients, norm
        loss = self.group.sum({"loss": loss})["loss"]
        own, norm = self.sharding.sum(gradients)
        # Rank 0's numbers: not every backend sums to the same bits everywhere, and all must decide alike.
        shared = self.group.share(mx.concatenate([loss.reshape(-1), norm.reshape(1)]))
        return shared[:-1].reshape(loss.shape), own, shared[-1]

    def _micro_batches(self, batch: Batch, iteration: int) -> Iterator[list[np.ndarray[Any, Any]]]:
        """Yield this rank's rows of each micro-batch: ids, targets, weights and, for dropout, keys."""
        arrays: list[np.ndarray[Any, Any]] = [batch.ids, batch.targets, batch.weights]
        adapters = adapters_of(self.model)
        if self.dropout or (adapters is not None and adapters.dropout):
            arrays.append(draw_keys(self._dropout_seed, iteration, rows=len(batch.ids)))
        together = self.micro_rows(batch) * self.group.size  # ranks compute parts of a range of rows, as lanes do
        for start in range(0, len(batch.ids), together):
            own = self.group.part(min(together, len(batch.ids) - start))
            if own.start < own.stop:
                yield [array[start + own.start : start + own.stop] for array in arrays]
            elif start == 0:  # no rows for this rank: compute one with weight 0
                yield [array[:1] * 0 if array is batch.weights else array[:1] for array in arrays]

    def _update(self, gradients: Flat, norm: mx.array, rates: Rates[float]) -> None:
        """Clip the gradients and update the parameters; with several ranks, each its part."""
        parameters = flatten_parameters(self.model)
        if self.sharding is None:
            for moved in self.optimizer.update(parameters, gradients, rates, norm, self.lanes):
                set_parameters(self.model, moved)
            return
        own = {name: piece.of(parameters[name]) for name, piece in self.sharding.own.items()}
        new = Flat()
        for moved in self.optimizer.update(own, gradients, rates, norm, self.lanes):
            new |= moved
        for name, whole in self.sharding.gather(new):
            mx.eval(whole)
            set_parameters(self.model, {name: whole})

    def _loss_and_gradients(
        self, parameters: Flat, ids: mx.array, targets: mx.array, weights: mx.array, keys: mx.array | None = None
    ) -> Gradients:
        """Return the loss and the gradients, of embeddings those of the rows that were read.

        An embedding is as large as all layers of a small model, and few of its rows are read: its whole gradient would
        be filled, kept and summed for each micro-batch.
        """
        self.num_traces += 1  # runs only while tracing
        model, masters, trained = self.model, flatten_parameters(self.model), trained_parameters(self.model)
        model.recompute = self.recompute
        tables = {f"{name}.weight": name for name in model.tables()}
        modules = {name: module_at(model, name) for name in tables.values()}
        rows = {name: parameters[name][ids] for name in tables}
        others = {name: value for name, value in parameters.items() if name not in tables}

        def loss_of(moved: Flat, moved_rows: Flat) -> tuple[mx.array, mx.array]:
            set_parameters(model, cast_parameters({**others, **moved}, self.dtype))
            read = {**rows, **moved_rows}
            set_parameters(model, {tables[name]: LookedUp(value.astype(self.dtype)) for name, value in read.items()})
            with dropping(None if keys is None else Dropping(self.dropout, keys)):
                hidden = model.hidden(ids)
            return self._loss(hidden, ids, targets, weights, frozen_head="lm_head.weight" not in trained)

        try:
            (_, loss), (gradients, of_rows) = mx.value_and_grad(loss_of, argnums=(0, 1))(
                {name: value for name, value in others.items() if name in trained},
                {name: value for name, value in rows.items() if name in trained},
            )
        finally:
            set_parameters(model, modules)
            set_parameters(model, masters)
        flat = {name: (ids.reshape(-1), row.reshape(-1, row.shape[-1])) for name, row in of_rows.items()}
        return Gradients(loss, gradients, flat)

    def _loss(
        self, hidden: mx.array, ids: mx.array, targets: mx.array, weights: mx.array, *, frozen_head: bool
    ) -> tuple[mx.array, mx.array]:
        """Return the loss, and the numbers to report: the loss alone, or with a teacher total, ce and kl."""
        head, targets = self.model.head_weight, mx.maximum(targets, 0)
        if self.distillation is not None:
            teacher, mix = self.distillation.teacher, self.distillation.mix
            total, *parts = distillation_sum(
                hidden, head, targets, weights, teacher.logits(ids), mix, capped=teacher.capped, frozen_head=frozen_head
            )
            return total, mx.stack([mx.stop_gradient(total), *parts])
        total = cross_entropy_sum(
            hidden.reshape(-1, hidden.shape[-1]),
            head,
            targets.reshape(-1),
            weights.reshape(-1),
            frozen_head=frozen_head,
        )
        return total, total


@accelerated
def step_context(step: TrainStep, batch: Batch) -> AbstractContextManager[None]:
    """Return the context in which a step computes a batch."""
    return nullcontext()
