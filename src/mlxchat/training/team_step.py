"""The training step of a team: rank 0 sends batch and rates, every rank computes its rows and updates its part.

Every rank creates a `TrainStep` from the model, the optimizer's rules and the settings that rank 0 sends once. Sums
have the same bits on all ranks, so all decide alike whether to skip an update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxchat.distributed.team import Team, name_of
from mlxchat.engine.third_party import ThirdPartyEngine
from mlxchat.model.gpt import GPT
from mlxchat.model.replicas import model_on, moving_on_all, sync_model
from mlxchat.ops.device import prepare_machine
from mlxchat.ops.loss import Mix
from mlxchat.optim.optimizer import Flat, Optimizer, Rates
from mlxchat.planning.memory import TeacherSize
from mlxchat.runner.context import Context
from mlxchat.training.batches import Batch
from mlxchat.training.step import TrainStep
from mlxchat.training.teacher import Distillation, OutsideTeacher, OwnTeacher


def make_step(
    ctx: Context, model: GPT, optimizer: Optimizer, *, distillation: Distillation | None = None, **settings: Any
) -> TrainStep | TeamStep:
    """Return the step of the context's team, or of this process alone; `settings` are `TrainStep`'s."""
    machine = ctx.config.machine
    settings |= {"dtype": prepare_machine(machine), "recompute": machine.grad_checkpointing}
    settings["dropout_seed"] = ctx.seed("dropout")
    if ctx.team is None or ctx.team.size == 1:
        return TrainStep(model, optimizer, distillation=distillation, **settings)
    return TeamStep(ctx.team, model, optimizer, distillation, settings)


class TeamStep:
    """The counterpart of `TrainStep` on rank 0.

    The first call distributes the moments: then each rank has those of its part only, and `Optimizer.whole_state`
    gathers all.
    """

    def __init__(
        self, team: Team, model: GPT, optimizer: Optimizer, distillation: Distillation | None, settings: dict[str, Any]
    ) -> None:
        self.team, self.model, self.optimizer, self.dtype = team, model, optimizer, settings["dtype"]
        self._distillation, self._settings = distillation, settings
        self._own: TrainStep | None = None
        """Rank 0's step; None before the first call."""

    @property
    def loss_parts(self) -> dict[str, float]:
        """See `TrainStep.loss_parts`."""
        return {} if self._own is None else self._own.loss_parts

    def __call__(
        self, batch: Batch, rates: Rates, iteration: int = 0, meanwhile: Callable[[], object] | None = None
    ) -> tuple[float, float]:
        """Update the model on all ranks; see `TrainStep`."""
        sync_model(self.team, self.model)
        if self._own is None:
            self._own = self._begin()
        self.team.kept["meanwhile"] = meanwhile
        with moving_on_all(self.team, self.model):
            request = {"rates": list(rates), "iteration": iteration}
            arrays = {"ids": batch.ids, "targets": batch.targets, "weights": batch.weights}
            return cast(tuple[float, float], self.team.call(_train, request, arrays))

    def _begin(self) -> TrainStep:
        """Create the steps of all ranks; return rank 0's."""
        request = {
            "settings": {**self._settings, "dtype": name_of(self.dtype)},
            "optimizer": self.optimizer.recipe,
            "teacher": _send_teacher(self.team, self._distillation),
            "has_moments": bool(cast(float, self.optimizer.state["count"].item())),
        }
        self.team.kept["training"] = (self.model, self.optimizer, self._distillation)
        self.optimizer.gather_state = partial(self.team.call, _gather_state)
        return cast(TrainStep, self.team.call(_begin, request))


Step = TrainStep | TeamStep


def _begin(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> TrainStep:
    """Create this rank's step."""
    given, settings = team.kept.pop("training", None), request["settings"]
    dtype = getattr(mx, settings["dtype"])
    state: Flat = {}
    if team.group.leads:
        model, optimizer, distillation = given
        state = optimizer.state
    else:
        del given  # an earlier training, with its moments
        model = model_on(team)
        optimizer = Optimizer.of_recipe(model, request["optimizer"])
        distillation = _receive_teacher(team, request["teacher"], dtype)
    settings = {**settings, "dtype": dtype, "distillation": distillation}
    step = TrainStep(model, optimizer, group=team.group, **settings)
    if request["has_moments"] and step.sharding is not None:
        step.sharding.deal_state(state)
    mx.eval(optimizer.state)
    team.kept["training"] = step
    return step


def _train(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> tuple[float, float]:
    """Update the model; return the loss and the gradients' norm."""
    step: TrainStep = team.kept["training"]
    batch = Batch(np.array(arrays["ids"]), np.array(arrays["targets"]), np.array(arrays["weights"]))
    return step(batch, Rates(*request["rates"]), request["iteration"], team.kept.pop("meanwhile", None))


def _gather_state(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> Flat:
    """Return the optimizer's whole state, on rank 0."""
    sharding = team.kept["training"].sharding
    return cast(Flat, sharding.gather_state())


def _send_teacher(team: Team, distillation: Distillation | None) -> dict[str, Any] | None:
    """Return what ranks need to create the teacher; sends the weights of a checkpoint of ours."""
    if distillation is None:
        return None
    request = {"mix": asdict(distillation.mix), "size": asdict(distillation.size)}
    if isinstance(teacher := distillation.teacher, OutsideTeacher):
        return {**request, "folder": str(teacher.folder.absolute()), "vocab_size": teacher.vocab_size}
    sync_model(team, teacher.model, "teacher")
    return request


def _receive_teacher(team: Team, request: dict[str, Any] | None, dtype: mx.Dtype) -> Distillation | None:
    """Return rank 0's teacher."""
    if request is None:
        return None
    teacher: OwnTeacher | OutsideTeacher
    if "folder" in request:
        folder = Path(request["folder"])
        teacher = OutsideTeacher(ThirdPartyEngine.load(folder).model, request["vocab_size"], folder)
    else:
        teacher = OwnTeacher(model_on(team, "teacher"), dtype)
    return Distillation(teacher=teacher, mix=Mix(**request["mix"]), size=TeacherSize(**request["size"]))
