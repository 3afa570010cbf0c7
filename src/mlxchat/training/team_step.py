"""The training step of a team: rank 0 sends batch and rates, every rank computes its rows and updates its part.

Every rank creates a `TrainStep` from the model, the optimizer's rules and the settings that rank 0 sends once. Sums
have the same bits on all ranks, so all decide alike whether to skip an update.
"""

from __future__ import annotations

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
from mlxchat.ops.loss import Mix
from mlxchat.optim.optimizer import Flat, Optimizer, Rates
from mlxchat.planning.memory import TeacherSize
from mlxchat.training.batches import Batch
from mlxchat.training.step import TrainStep
from mlxchat.training.teacher import Distillation, OutsideTeacher, OwnTeacher, TeacherModel


def make_step(
    team: Team | None, model: GPT, optimizer: Optimizer, *, distillation: Distillation | None = None, **settings: Any
) -> TrainStep | TeamStep:
    """Return the step of a team, or of this process alone; the arguments are `TrainStep`'s."""
    if team is None or team.size == 1:
        return TrainStep(model, optimizer, distillation=distillation, **settings)
    return TeamStep(team, model, optimizer, distillation, settings)


class TeamStep:
    """The counterpart of `TrainStep` on rank 0.

    Once it is created, each rank has the moments of its part only; `Optimizer.whole_state` gathers all.
    """

    def __init__(
        self, team: Team, model: GPT, optimizer: Optimizer, distillation: Distillation | None, settings: dict[str, Any]
    ) -> None:
        """Create the steps of all ranks from rank 0's weights, moments and `TrainStep` settings."""
        self.team, self.model, optimizer.gather_state = team, model, partial(team.call, _gather_state)
        sync_model(team, model)
        request = {
            "settings": {**settings, "dtype": name_of(settings["dtype"])},
            "optimizer": optimizer.recipe(), "teacher": send_teacher(team, distillation),
            "has_moments": bool(cast(float, optimizer.state["count"].item())),
        }  # fmt: skip
        team.kept["training"] = (model, optimizer, distillation)
        self._step = cast(TrainStep, team.call(_begin, request))

    @property
    def loss_parts(self) -> dict[str, float]:
        """See `TrainStep.loss_parts`."""
        return self._step.loss_parts

    def __call__(self, batch: Batch, rates: Rates[float], iteration: int = 0) -> tuple[float, float]:
        """Update the model on all ranks; see `TrainStep`."""
        sync_model(self.team, self.model)
        with moving_on_all(self.team, self.model):
            request = {"rates": list(rates), "iteration": iteration}
            arrays = {"ids": batch.ids, "targets": batch.targets, "weights": batch.weights}
            return cast(tuple[float, float], self.team.call(_train, request, arrays))


def _begin(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> TrainStep:
    """Create this rank's step."""
    given, settings = team.kept.pop("training", None), request["settings"]
    dtype, state = getattr(mx, settings["dtype"]), {}
    if team.group.leads:
        model, optimizer, distillation = given
        state = optimizer.state
    else:
        del given  # an earlier training, with its moments
        model = model_on(team)
        optimizer = Optimizer.of_recipe(model, request["optimizer"])
        distillation = _make_distillation(team, request["teacher"], dtype)
    settings = {**settings, "dtype": dtype, "distillation": distillation}
    step = TrainStep(model, optimizer, group=team.group, **settings)
    if request["has_moments"] and step.sharding is not None:
        step.sharding.deal_state(optimizer, state)
    mx.eval(optimizer.state)
    team.kept["training"] = step
    return step


def _train(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> tuple[float, float]:
    """Update the model; return the loss and the gradients' norm."""
    step: TrainStep = team.kept["training"]
    batch = Batch(np.array(arrays["ids"]), np.array(arrays["targets"]), np.array(arrays["weights"]))
    return step(batch, Rates(*request["rates"]), request["iteration"])


def _gather_state(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> Flat:
    """Return the optimizer's whole state, on rank 0."""
    step: TrainStep = team.kept["training"]
    assert step.sharding is not None
    return step.sharding.gather_state(step.optimizer)


def send_teacher(team: Team, distillation: Distillation | None) -> dict[str, Any] | None:
    """Return what ranks need to create the teacher; sends the weights of a checkpoint of ours."""
    if distillation is None:
        return None
    teacher = distillation.teacher
    request = {"mix": asdict(distillation.mix), "size": asdict(distillation.size)}
    if isinstance(teacher, OwnTeacher):
        sync_model(team, teacher.model, "teacher")
        return request
    assert isinstance(teacher, OutsideTeacher), "ranks can create these two"
    return {**request, "folder": str(teacher.folder.absolute()), "vocab_size": teacher.vocab_size}


def _make_distillation(team: Team, request: dict[str, Any] | None, dtype: mx.Dtype) -> Distillation | None:
    """Return rank 0's teacher."""
    if request is None:
        return None
    teacher: TeacherModel
    if "folder" in request:
        folder = Path(request["folder"])
        teacher = OutsideTeacher(ThirdPartyEngine.load(folder).model, request["vocab_size"], folder)
    else:
        teacher = OwnTeacher(model_on(team, "teacher"), dtype)
    return Distillation(teacher=teacher, mix=Mix(**request["mix"]), size=TeacherSize(**request["size"]))
