"""The training step of several ranks: each computes the gradients of some rows, rank 0 updates the weights.

Rank 0 sends its weights and every rank's rows; only the sums of gradients come back. So the optimizer, its state and
the decision to skip an update are those of one process.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxchat.config.schema import TeacherConfig
from mlxchat.distributed.group import buckets
from mlxchat.distributed.team import Team, name_of
from mlxchat.model.gpt import GPT
from mlxchat.model.replicas import model_on, sync_model
from mlxchat.ops.device import prepare_machine
from mlxchat.optim.optimizer import Flat, Optimizer
from mlxchat.runner.context import Context
from mlxchat.training.step import Backward, Rows, Sums, TrainStep
from mlxchat.training.teacher import Distillation


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
    """Prepare this rank's part of a training."""
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
