"""The training step of a team: rank 0 sends each batch with its rates, every rank computes its rows and moves its part.

Every rank has a `TrainStep` of its own, made from the model, the optimizer's rules and the settings that rank 0 sends
once. Sums are the same bits on all ranks, so all decide alike whether an update counts.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxchat.distributed.team import Team, name_of
from mlxchat.evals.outside import load_outside
from mlxchat.model.gpt import GPT
from mlxchat.model.replicas import model_on, moving_on_all, sync_model
from mlxchat.ops.loss import Mix
from mlxchat.optim.optimizer import Flat, Optimizer, Rates
from mlxchat.planning.given import TeacherSize
from mlxchat.training.batches import Batch
from mlxchat.training.step import TrainStep
from mlxchat.training.teacher import Distillation, OutsideTeacher, OwnTeacher, TeacherModel


def make_step(
    team: Team | None, model: GPT, optimizer: Optimizer, *, distillation: Distillation | None = None, **settings: Any
) -> TrainStep | TeamStep:
    """Return the step of a team's ranks together, or of this process alone; the arguments are `TrainStep`'s."""
    if team is None or team.size == 1:
        return TrainStep(model, optimizer, distillation=distillation, **settings)
    return TeamStep(team, model, optimizer, distillation, settings)


class TeamStep:
    """On rank 0 what `TrainStep` is to a single process; the ranks begin with the first batch."""

    def __init__(
        self, team: Team, model: GPT, optimizer: Optimizer, distillation: Distillation | None, settings: dict[str, Any]
    ) -> None:
        """Take a team, and what `TrainStep` takes."""
        self.team, self.model, self.optimizer, self.distillation = team, model, optimizer, distillation
        self._settings = settings
        self._step: TrainStep | None = None
        self.loss_parts: dict[str, float] = {}
        """With a teacher, of the last batch: ce, the mean cross-entropy, and kl, the mean divergence."""

    def __call__(self, batch: Batch, rates: Rates[float], iteration: int = 0) -> tuple[float, float]:
        """Update the model on all ranks; see `TrainStep`."""
        step = self._step or self._begin()
        sync_model(self.team, self.model)
        arrays = {"ids": batch.ids, "targets": batch.targets, "weights": batch.weights}
        with moving_on_all(self.team, self.model):
            found = self.team.call(_train, {"rates": list(rates), "iteration": iteration}, arrays)
        self.loss_parts = step.loss_parts
        return cast(tuple[float, float], found)

    def end(self) -> None:
        """Let the ranks drop the training; rank 0's optimizer has all moments again."""
        if self._step is not None:
            self.optimizer.state, self.optimizer.gather_state = self.optimizer.whole_state(), None
            self.team.call(_end)
            self._step = None

    def _begin(self) -> TrainStep:
        """Have all ranks make their steps; return rank 0's."""
        sync_model(self.team, self.model)
        request = {
            "settings": {**self._settings, "dtype": name_of(self._settings["dtype"])},
            "optimizer": self.optimizer.recipe(), "teacher": self._send_teacher(),
            "has_moments": bool(cast(float, self.optimizer.state["count"].item())),
        }  # fmt: skip
        self.team.kept["training"] = self
        self._step = cast(TrainStep, self.team.call(_begin, request))
        self.optimizer.gather_state = partial(self.team.call, _gather_state)
        return self._step

    def _send_teacher(self) -> dict[str, Any] | None:
        """Return what ranks need to make the teacher; the weights of one of ours have been sent then."""
        if self.distillation is None:
            return None
        teacher = self.distillation.teacher
        request = {"mix": asdict(self.distillation.mix), "size": asdict(self.distillation.size)}
        if isinstance(teacher, OwnTeacher):
            sync_model(self.team, teacher.model, "teacher")
            return request
        assert isinstance(teacher, OutsideTeacher), "ranks can make these two"
        return {**request, "folder": str(teacher.folder.absolute()), "vocab_size": teacher.vocab_size}


def _begin(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> TrainStep:
    """Make this rank's step."""
    training = team.kept.pop("training", None)
    settings, state = {**request["settings"], "dtype": getattr(mx, request["settings"]["dtype"])}, {}
    if team.group.leads:
        model, optimizer, distillation = training.model, training.optimizer, training.distillation
        state = optimizer.state
    else:
        del training  # an earlier one, with its moments
        model = model_on(team)
        optimizer = Optimizer.of_recipe(model, request["optimizer"])
        distillation = _make_distillation(team, request["teacher"], settings["dtype"])
    step = TrainStep(model, optimizer, distillation=distillation, group=team.group, **settings)
    if request["has_moments"] and step.sharding is not None:
        step.sharding.deal_state(optimizer, state)
    mx.eval(optimizer.state)
    team.kept["training"] = step
    return step


def _train(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> tuple[float, float]:
    """Make one step; return the loss and the gradients' norm."""
    step: TrainStep = team.kept["training"]
    batch = Batch(*(np.array(arrays[name]) for name in ("ids", "targets", "weights")))
    return step(batch, Rates(*request["rates"]), request["iteration"])


def _gather_state(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> Flat:
    """Return the optimizer's whole state, on rank 0."""
    step: TrainStep = team.kept["training"]
    assert step.sharding is not None
    return step.sharding.gather_state(step.optimizer)


def _end(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    """Drop the training."""
    del team.kept["training"]


def _make_distillation(team: Team, request: dict[str, Any] | None, dtype: mx.Dtype) -> Distillation | None:
    """Return the teacher that rank 0 has."""
    if request is None:
        return None
    teacher: TeacherModel
    if "folder" in request:
        folder = Path(request["folder"])
        outside, _ = load_outside(folder)
        teacher = OutsideTeacher(outside.model, request["vocab_size"], folder)
    else:
        teacher = OwnTeacher(model_on(team, "teacher"), dtype)
    return Distillation(teacher=teacher, mix=Mix(**request["mix"]), size=TeacherSize(**request["size"]))
