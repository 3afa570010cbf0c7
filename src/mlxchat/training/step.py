"""One iteration: micro-batches → loss and gradients → their sums → update. Compiled once per shape.

With several ranks, rank 0 sends its weights and every rank's rows; only the sums of gradients come back. So the
optimizer, its state and the decision to skip an update are those of one process.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from mlxchat.config.schema import TeacherConfig
from mlxchat.data.packing import Batch
from mlxchat.distributed.team import Team, buckets, name_of
from mlxchat.model.checkpoint import model_on, sync_model
from mlxchat.model.forward import Dropping, LookedUp, draw_keys, dropping, recomputed
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import adapters_of
from mlxchat.model.parameters import cast_parameters, flatten_parameters, module_at, set_parameters, trained_parameters
from mlxchat.ops.device import compiled_method, prepare_machine
from mlxchat.ops.loss import Logits, cross_entropy_sum, distillation_sum
from mlxchat.optim.optimizer import Flat, Optimizer, Rates
from mlxchat.runner.context import Context

Rows = dict[str, np.ndarray[Any, Any]]  # rows of a batch: ids, targets and weights (B, T), and with dropout keys (B, 2)


class Distillation:
    """A teacher and the weight of its distributions in the loss."""

    def __init__(self, teacher: GPT, mix: TeacherConfig, dtype: mx.Dtype) -> None:
        """Cast the teacher's weights to the dtype of the computation."""
        self.teacher, self.mix = teacher, mix
        set_parameters(teacher, {name: value.astype(dtype) for name, value in flatten_parameters(teacher).items()})
        mx.eval(flatten_parameters(teacher))
        self.see = compiled_method(teacher.hidden)
        """Returns what `logits` needs of a batch (B, T): the states (B, T, C) of all positions."""

    def logits(self, seen: mx.array) -> Logits:
        """Return the function that gives the logits of a batch."""
        # Not `self`, whose compiled function MLX could not free together with the step's, which keeps this closure.
        teacher = self.teacher

        def of(part: slice, after: list[mx.array]) -> mx.array:
            (states,) = mx.depends([seen[:, part].reshape(-1, seen.shape[-1])], after)
            return teacher.logits(states)

        return of


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
        self, model: GPT, *, micro_tokens: int, dtype: mx.Dtype, recompute: bool = False, dropout: float = 0.0,
        distillation: Distillation | None = None,
    ) -> None:  # fmt: skip
        """Take float32 master weights, the most tokens of a micro-batch (at least one row), and the compute type.

        `recompute` computes a layer's activations again in the backward pass instead of keeping them. `dropout` is the
        rate on the embedding and on what each attention and MLP adds. `distillation` is a teacher to learn from, too.
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
        self.loss_parts = dict(zip(("ce", "kl"), parts, strict=False))
        return result, length

    def gradients(self, batch: Batch, iteration: int = 0) -> Sums:
        """Return the loss of a batch and its gradients; nothing is changed."""
        rows: Rows = {"ids": batch.ids, "targets": batch.targets, "weights": batch.weights}
        adapters = adapters_of(self.model)
        if self.dropout or (adapters is not None and adapters.dropout):
            rows["keys"] = draw_keys(self._dropout_seed, iteration, rows=len(batch.ids))
        return self.sum_gradients(rows)


def make_step(ctx: Context, model: GPT, optimizer: Optimizer, **settings: Any) -> TrainStep:
    """Return the step of the context's team, or of this process alone; `settings` are `TrainStep`'s."""
    machine = ctx.config.machine
    settings |= {"dtype": prepare_machine(machine), "recompute": machine.grad_checkpointing}
    settings["dropout_seed"] = ctx.seed("dropout")
    if ctx.team is None or ctx.team.size == 1:
        return TrainStep(model, optimizer, **settings)
    return TeamStep(ctx.team, model, optimizer, **settings)


class TeamStep(TrainStep):
    """A `TrainStep` on rank 0 whose gradients are computed by all ranks."""

    def __init__(self, team: Team, model: GPT, optimizer: Optimizer, **settings: Any) -> None:
        """Take a team and what `TrainStep` takes."""
        super().__init__(model, optimizer, **settings)
        self.team, self.num_ranks = team, team.size

    def sum_gradients(self, rows: Rows) -> Sums:
        """Return loss and gradients of rows, of which each rank computes a part."""
        sync_model(self.team, self.model)
        if self.team.kept.get("training") is not self:
            self.team.kept["training"] = self
            settings = {name: getattr(self, name) for name in ("micro_tokens", "recompute", "dropout")}
            teacher = None
            if self.distillation is not None:
                sync_model(self.team, self.distillation.teacher, "teacher")
                teacher = asdict(self.distillation.mix)
            self.team.call(_begin, {"settings": settings, "dtype": name_of(self.dtype), "teacher": teacher})
        return cast(Sums, self.team.call(_sum_gradients, arrays=rows))


def _begin(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    if team.group.leads:
        return
    dtype, distillation = getattr(mx, request["dtype"]), None
    if (teacher := request["teacher"]) is not None:
        distillation = Distillation(model_on(team, "teacher"), TeacherConfig(**teacher), dtype)
    team.kept["training"] = Backward(model_on(team), dtype=dtype, distillation=distillation, **request["settings"])


def _sum_gradients(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> Sums:
    """Return the sums over all rows, of which this rank computes a part."""
    part = team.group.part(len(arrays["ids"]))
    rows = {name: np.array(array)[part] for name, array in arrays.items()}
    if part.start == part.stop:  # no rows for this rank: compute one with weight 0
        rows = {name: np.array(array)[:1] * (name != "weights") for name, array in arrays.items()}
    loss, own = Backward.sum_gradients(team.kept["training"], rows)
    gradients: Flat = {}
    for names in list(buckets(own)):
        gradients |= team.group.sum({name: own.pop(name).astype(mx.float32) for name in names})
    return Sums(team.group.sum({"loss": loss})["loss"], gradients)


@mx.compile
def _add(gradient: mx.array, total: mx.array) -> mx.array:
    return gradient.astype(mx.float32) + total.astype(mx.float32)


def flat(x: mx.array) -> mx.array:
    """Return x (B, T, C) as (N, C)."""
    return x.reshape(-1, x.shape[-1])
