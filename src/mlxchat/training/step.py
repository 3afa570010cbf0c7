"""One iteration: loss and gradients of its micro-batches, clipping, the optimizer's update; compiled per shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import Ints, trim_rows
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
from mlxchat.ops.cross_entropy import cross_entropy_sum
from mlxchat.ops.distillation import distillation_sum
from mlxchat.ops.dropout import Dropping, draw_keys, dropping
from mlxchat.ops.lanes import make_lanes
from mlxchat.optim.groups import Flat, Optimizer, clip_factor
from mlxchat.optim.schedule import Rates
from mlxchat.optim.sharding import Sharding
from mlxchat.planning.memory import Device, Training, predict_peak
from mlxchat.training.gradient_sums import LossAndGradients, TableRows, add_rows, add_sums, sum_gradients
from mlxchat.training.teacher import Distillation

_LOSS_PARTS = ("ce", "kl")


@dataclass(frozen=True)
class Batch:
    """Rows of one iteration: ids (B, T), targets (B, T) with −1 where no loss is taken, weights (B, T).

    The loss is Σ weight × cross-entropy. With weights 1 / number of targets it is the mean over the iteration's
    tokens, whatever the micro-batches; in RL the weights are advantages.
    """

    ids: Ints
    targets: Ints
    weights: np.ndarray[Any, np.dtype[np.float32]]


def mean_batch(rows: Sequence[tuple[Ints, Ints]], *, trimmed: bool = False) -> Batch:
    """Return rows as a batch whose loss is the mean over all their targets, on request without their common padding."""
    ids = np.stack([row[0] for row in rows])
    targets = np.stack([row[1] for row in rows])
    if trimmed:
        ids, targets = trim_rows(ids, targets)
    counted = targets >= 0
    return Batch(ids, targets, (counted / max(1, int(counted.sum()))).astype(np.float32))


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
            dtype: what to compute in.
            recompute: whether a layer's activations are computed again instead of being kept for the gradient.
            dropout: share of the embedding, and of what layers add to it, that is left out; 0: nothing.
            dropout_seed: of which: what is left out of a row depends on it, the iteration and the row's number alone.
            distillation: a teacher whose distributions are learnt besides the targets.
            group: ranks that make this step together, each with equal weights and the whole batch; each computes its
                rows, sums are made over all, and each moves its part of the parameters.
        """
        self.distillation = distillation
        self.loss_parts: dict[str, float] = {}
        """With a teacher, of the last batch: ce, the mean cross-entropy, and kl, the mean divergence."""
        self.model, self.optimizer = model, optimizer
        self.micro_tokens, self.dtype, self.recompute = micro_tokens, dtype, recompute
        self.dropout, self._dropout_seed = dropout, dropout_seed
        self.num_traces = 0
        self._lanes = make_lanes()
        self._group = group
        self.sharding = Sharding(group, optimizer) if group.size > 1 else None
        """Which rank moves what; None: this process moves everything."""
        self._shares = optimizer.share(len(self._lanes))
        self._own_shares = self.sharding.share(optimizer, len(self._lanes)) if self.sharding else self._shares
        self._gradients: Callable[..., tuple[mx.array, Flat, TableRows]] = mx.compile(self._loss_and_gradients)
        self._sum: Callable[..., tuple[Flat, mx.array]] = mx.compile(sum_gradients)
        self._move: Callable[..., tuple[Flat, Flat]] = mx.compile(self._clip_and_move)

    def end(self) -> None:
        """Do nothing: all weights and moments are here."""

    def __call__(self, batch: Batch, rates: Rates[float], iteration: int = 0) -> tuple[float, float]:
        """Update the model; return the loss and the gradients' norm before clipping.

        The iteration matters to dropout alone. If either is NaN or infinite, weights and optimizer stay as they were.
        """
        rows = max(1, self.micro_tokens // batch.ids.shape[1])
        lanes = len(self._lanes.deal(max(1, min(rows, self._num_own_rows(batch)))))
        with self._lanes.sharing(lanes, partial(self._need_bytes, batch, rows)):
            loss, sums, norm = self._gradients_of(batch, rows, iteration)
            values = cast(list[float], loss.reshape(-1).tolist())
            self.loss_parts = dict(zip(_LOSS_PARTS, values[1:], strict=False))
            result = float(values[0]), float(cast(float, norm.item()))
            if math.isfinite(result[0]) and math.isfinite(result[1]):
                self._update(sums, norm, Rates(*(mx.array(rate, dtype=mx.float32) for rate in rates)))
        return result

    def gradients(self, batch: Batch, iteration: int = 0) -> LossAndGradients:
        """Return the loss and the gradient of every parameter by name, before clipping; nothing is changed."""
        rows = max(1, self.micro_tokens // batch.ids.shape[1])
        loss, sums, _ = self._gradients_of(batch, rows, iteration)
        return loss, {name: gradient for lane in sums for name, gradient in lane.items()}

    def _need_bytes(self, batch: Batch, rows: int) -> int:
        """Return the memory that a step needs beyond weights, moments and a teacher, by the estimate for a CPU."""
        own_rows = max(1, self._num_own_rows(batch))
        training = Training(
            sizes=self.model.sizes,
            optimizer=self.optimizer.config,
            rows=own_rows * self._group.size,
            row_tokens=batch.ids.shape[1],
            device=Device(num_lanes=len(self._lanes), compute_bytes=self.dtype.size),
            recompute=self.recompute,
            teacher=None if self.distillation is None else self.distillation.size,
            adapters=adapters_of(self.model),
            num_ranks=self._group.size,
        )
        peak = predict_peak(training, min(rows, own_rows))
        return peak.total - peak.weights - peak.moments - peak.kept

    def _gradients_of(self, batch: Batch, rows: int, iteration: int) -> tuple[mx.array, list[Flat], mx.array]:
        """Return the loss, the gradients, each lane its share of them, and their common norm; all evaluated."""
        arrays: list[np.ndarray[Any, Any]] = [batch.ids, batch.targets, batch.weights]
        adapters = adapters_of(self.model)
        if self.dropout or (adapters is not None and adapters.dropout):
            arrays.append(draw_keys(self._dropout_seed, iteration, rows=len(batch.ids)))
        totals: list[LossAndGradients] = []
        tables: list[Flat] = [{} for _ in self._shares]
        # What ranks compute at the same time are parts of one stretch of rows, as lanes' are.
        together = rows * self._group.size
        for start in range(0, len(batch.ids), together):
            stretch = [array[start : start + together] for array in arrays]
            own = self._group.part(len(stretch[0]))
            if own.start == own.stop:
                continue
            parts = self._micro_batch([array[own] for array in stretch])
            # Without what follows, which needs both: MLX would hand out one lane's work after the other's.
            mx.eval(parts)
            totals = self._add(totals, [(loss, gradients) for loss, gradients, _ in parts])
            tables = self._add_tables(tables, [table_rows for _, _, table_rows in parts])
            del parts
            # Now, so that only one micro-batch is ever in memory.
            mx.eval(totals, tables)
        if not totals:
            totals, tables = self._nothing()
        loss, sums, norm = self._sum_lanes(totals, tables)
        del totals, tables
        mx.eval(loss, sums, norm)
        return (loss, sums, norm) if self.sharding is None else self._sum_ranks(self.sharding, loss, sums)

    def _micro_batch(self, arrays: list[np.ndarray[Any, Any]]) -> list[tuple[mx.array, Flat, TableRows]]:
        """Return the sums over the rows of each lane, and what it adds to the tables' gradients."""
        parameters = flatten_parameters(self.model)
        return self._lanes.run(
            [
                partial(self._gradients, parameters, *(mx.array(array[part]) for array in arrays))
                for part in self._lanes.deal(len(arrays[0]))
            ]
        )

    def _add(self, totals: list[LossAndGradients], more: list[LossAndGradients]) -> list[LossAndGradients]:
        """Return the lanes' sums of two micro-batches."""
        if not totals:
            return more
        return self._lanes.run([partial(add_sums, *pair) for pair in zip_longest(totals, more)])

    def _add_tables(self, totals: list[Flat], more: list[TableRows]) -> list[Flat]:
        """Return the tables' gradients, each lane those of its share, with the rows of all lanes added."""
        shapes = {name: value.shape for name, value in flatten_parameters(self.model).items()}
        calls = [
            partial(
                add_rows,
                {name: total.get(name, mx.zeros(shapes[name])) for name in names if name in more[0]},
                more,
            )
            for names, total in zip(self._shares, totals, strict=True)
        ]
        return self._lanes.run(calls)

    def _sum_lanes(self, totals: list[LossAndGradients], tables: list[Flat]) -> tuple[mx.array, list[Flat], mx.array]:
        """Return the loss, the gradients' sums, each lane its share of them, and their common norm."""
        loss = sum((part for part, _ in totals[1:]), totals[0][0])
        calls = [
            partial(
                self._sum,
                [{name: gradients[name] for name in names if name in gradients} for _, gradients in totals],
                table,
            )
            for names, table in zip(self._shares, tables, strict=True)
        ]
        sums = self._lanes.run(calls)
        return loss, [total for total, _ in sums], mx.sqrt(sum((squares for _, squares in sums[1:]), sums[0][1]))

    def _num_own_rows(self, batch: Batch) -> int:
        """Return about how many rows of a batch this rank computes."""
        return len(range(len(batch.ids))[self._group.part(len(batch.ids))])

    def _nothing(self) -> tuple[list[LossAndGradients], list[Flat]]:
        """Return the sums of a rank that has no rows."""
        tables, shapes = {f"{name}.weight" for name in self.model.tables()}, self.optimizer.shapes
        zeros = [{name: mx.zeros(shapes[name]) for name in names} for names in self._shares]
        gradients = {name: value for share in zeros for name, value in share.items() if name not in tables}
        loss = mx.zeros(() if self.distillation is None else 1 + len(_LOSS_PARTS))
        of_tables = [{name: value for name, value in share.items() if name in tables} for share in zeros]
        return [(loss, gradients)], of_tables

    def _sum_ranks(self, sharding: Sharding, loss: mx.array, sums: list[Flat]) -> tuple[mx.array, list[Flat], mx.array]:
        """Return loss and norm of all ranks, and of the gradients' sums what this rank moves, each lane its share."""
        loss = self._group.sum({"loss": loss})["loss"]
        gradients = {name: lane.pop(name) for lane in sums for name in list(lane)}
        own, norm = sharding.sum(gradients)
        # Rank 0's numbers: not every backend sums to the same bits everywhere, and all must decide alike.
        told = self._group.share(mx.concatenate([loss.reshape(-1), norm.reshape(1)]))
        loss, norm = told[:-1].reshape(loss.shape), told[-1]
        return loss, [{name: own.pop(name) for name in names} for names in self._own_shares], norm

    def _update(self, sums: list[Flat], norm: mx.array, rates: Rates[mx.array]) -> None:
        """Move the parameters, each lane its share of them, a few at a time, so that few exist both old and new."""
        parameters, state = flatten_parameters(self.model), self.optimizer.state
        if self.sharding is not None:
            parameters = {name: piece.of(parameters[name]) for name, piece in self.sharding.own.items()}
        count, own = state["count"], Flat()
        state["count"] = count + 1
        for names_of_lanes in zip_longest(*(self.optimizer.batches(names) for names in self._own_shares), fillvalue=()):
            calls = [
                partial(
                    self._move,
                    {name: parameters.pop(name) for name in names},
                    {name: gradients.pop(name) for name in names},
                    {
                        "count": count,
                        **{name: state.pop(name) for name in self.optimizer.state_names(names) if name != "count"},
                    },
                    norm,
                    rates,
                )
                for names, gradients in zip(names_of_lanes, sums, strict=True)
            ]
            moved = self._lanes.run(calls)
            del calls
            for new, new_state in moved:
                if self.sharding is None:
                    set_parameters(self.model, new)
                else:
                    own |= new
                state.update(new_state)
            mx.eval(moved)
        if self.sharding is not None:
            mx.eval(state["count"])  # also where nothing of this rank was moved
            for name, whole in self.sharding.gather(own):
                mx.eval(whole)
                set_parameters(self.model, {name: whole})

    def _loss_and_gradients(
        self, parameters: Flat, ids: mx.array, targets: mx.array, weights: mx.array, keys: mx.array | None = None
    ) -> tuple[mx.array, Flat, TableRows]:
        """Return the loss, the gradients, and of the tables' ones the rows of the tokens that were read.

        A table of embeddings is as large as all the layers of a small model, and few of its rows are read: whole
        gradients of it would be filled, kept and added up by every lane.
        """
        self.num_traces += 1  # runs only while tracing
        self.model.recompute = self.recompute
        tables = {name: module_at(self.model, name) for name in self.model.tables()}

        def loss_of(masters: Flat, table_rows: Flat) -> tuple[mx.array, mx.array]:
            set_parameters(self.model, cast_parameters({**frozen, **masters}, self.dtype))
            rows = {**frozen_rows, **table_rows}
            set_parameters(self.model, {name: LookedUp(rows[f"{name}.weight"].astype(self.dtype)) for name in tables})
            with dropping(None if keys is None else Dropping(self.dropout, keys)):
                hidden = self.model.hidden(ids)
            set_parameters(self.model, tables)
            if self.distillation is not None:
                teacher, mix = self.distillation.teacher, self.distillation.mix
                total, *parts = distillation_sum(
                    hidden, self.model.head_weight, mx.maximum(targets, 0), weights, teacher.logits(ids), mix,
                    capped=teacher.capped, frozen_head=frozen_head,
                )  # fmt: skip
                return total, mx.stack([mx.stop_gradient(total), *parts])
            total = cross_entropy_sum(
                hidden.reshape(-1, self.model.sizes.width),
                self.model.head_weight,
                mx.maximum(targets, 0).reshape(-1),
                weights.reshape(-1),
                frozen_head=frozen_head,
            )
            return total, total

        masters = flatten_parameters(self.model)
        moved = trained_parameters(self.model)
        frozen_head = "lm_head.weight" not in moved
        table_rows = {name: parameters[name][ids] for name in (f"{table}.weight" for table in tables)}
        others = {name: value for name, value in parameters.items() if name not in table_rows and name in moved}
        frozen = {name: value for name, value in parameters.items() if name not in table_rows and name not in moved}
        frozen_rows = {name: table_rows.pop(name) for name in list(table_rows) if name not in moved}
        (_, loss), (gradients, rows) = mx.value_and_grad(loss_of, argnums=(0, 1))(others, table_rows)
        set_parameters(self.model, masters)
        return loss, gradients, {name: (ids.reshape(-1), row.reshape(-1, row.shape[-1])) for name, row in rows.items()}

    def _clip_and_move(
        self, parameters: Flat, gradients: Flat, state: Flat, norm: mx.array, rates: Rates[mx.array]
    ) -> tuple[Flat, Flat]:
        factor = clip_factor(norm, self.optimizer.config.grad_clip)
        if factor is not None:
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        return self.optimizer.move(parameters, gradients, state, rates)
