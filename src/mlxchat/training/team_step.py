"""The training step of a team: rank 0 says which batch, every rank computes its rows and moves its part.

What goes to the other ranks: once the model, the optimizer's rules and the settings, then each batch with its rates.
They keep a `TrainStep` of their own. Sums are the same bits on all ranks, so all decide alike whether a step counts.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxchat.distributed.team import Team
from mlxchat.evals.outside import load_outside
from mlxchat.model.gpt import GPT
from mlxchat.model.replicas import forget_equal, mark_equal, model_on, sync_model
from mlxchat.ops.distillation import Mix
from mlxchat.optim.optimizer import Flat, Optimizer, Rates
from mlxchat.planning.given import TeacherSize
from mlxchat.training.step import Batch, TrainStep
from mlxchat.training.teacher import Distillation, OutsideTeacher, OwnTeacher, TeacherModel

_KEPT, _TEACHER = "training", "teacher"


class TeamStep:
    """On rank 0 what `TrainStep` is to a process that is alone."""

    def __init__(
        self,
        team: Team,
        model: GPT,
        optimizer: Optimizer,
        *,
        micro_tokens: int,
        dtype: mx.Dtype,
        recompute: bool = False,
        dropout: float = 0.0,
        dropout_seed: int = 0,
        distillation: Distillation | None = None,
    ) -> None:
        """Take what `TrainStep` takes; the ranks begin with the first batch, with the weights and moments of then."""
        self.team, self.model, self.optimizer, self.distillation = team, model, optimizer, distillation
        self._settings = {
            "micro_tokens": micro_tokens, "dtype": _name_of(dtype), "recompute": recompute, "dropout": dropout,
            "dropout_seed": dropout_seed,
        }  # fmt: skip
        self._step: TrainStep | None = None
        self.loss_parts: dict[str, float] = {}
        """With a teacher, of the last batch: ce, the mean cross-entropy, and kl, the mean divergence."""

    def __call__(self, batch: Batch, rates: Rates[float], iteration: int = 0) -> tuple[float, float]:
        """Update the model on all ranks; see `TrainStep`.

        Raises:
            PeerLost: another rank is gone.
        """
        step = self._step or self._begin()
        sync_model(self.team, self.model)
        # The ranks move them alike. Until they have, nothing may hold on to the old ones.
        forget_equal(self.team)
        arrays = {"ids": batch.ids, "targets": batch.targets, "weights": batch.weights}
        found = self.team.call(_train, {"rates": list(rates), "iteration": iteration}, arrays)
        mark_equal(self.team, self.model)
        self.loss_parts = step.loss_parts
        return cast(tuple[float, float], found)

    def end(self) -> None:
        """Let the ranks forget the training; rank 0's optimizer has all moments again."""
        if self._step is not None:
            self.optimizer.state, self.optimizer.gather_state = self.optimizer.whole_state(), None
            self.team.call(_end)
            self._step = None

    def _begin(self) -> TrainStep:
        """Have all ranks get ready; return rank 0's own step."""
        sync_model(self.team, self.model)
        request = {**self._settings, "optimizer": self.optimizer.recipe(), "teacher": self._send_teacher()}
        request["has_moments"] = bool(cast(float, self.optimizer.state["count"].item()))
        self.team.kept[_KEPT] = self
        self._step = cast(TrainStep, self.team.call(_begin, request))
        self.optimizer.gather_state = partial(self.team.call, _gather_state)
        return self._step

    def _send_teacher(self) -> dict[str, Any] | None:
        """Return what ranks need to have the teacher, too; the weights of one of ours are with them then."""
        if self.distillation is None:
            return None
        teacher = self.distillation.teacher
        told = {"mix": asdict(self.distillation.mix), "size": asdict(self.distillation.size)}
        if isinstance(teacher, OwnTeacher):
            sync_model(self.team, teacher.model, _TEACHER)
            return told
        assert isinstance(teacher, OutsideTeacher), "ranks can make these two"
        return {**told, "folder": str(teacher.folder.absolute()), "vocab_size": teacher.vocab_size}


def make_step(
    team: Team | None, model: GPT, optimizer: Optimizer, *, distillation: Distillation | None = None, **settings: Any
) -> TrainStep | TeamStep:
    """Return the step of a team's ranks together, or of this process alone."""
    if team is None or team.size == 1:
        return TrainStep(model, optimizer, distillation=distillation, **settings)
    return TeamStep(team, model, optimizer, distillation=distillation, **settings)


def _begin(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> TrainStep:
    """Make this rank's step."""
    del arrays
    asking, state = team.kept.pop(_KEPT, None), {}
    if team.group.leads:
        model, optimizer, distillation = asking.model, asking.optimizer, asking.distillation
        state = optimizer.state
    else:
        del asking  # of an earlier training: its moments
        model = model_on(team)
        optimizer = Optimizer.of_recipe(model, request["optimizer"])
        distillation = _make_distillation(team, request["teacher"], getattr(mx, request["dtype"]))
    settings = {name: request[name] for name in ("micro_tokens", "recompute", "dropout", "dropout_seed")}
    step = TrainStep(
        model,
        optimizer,
        dtype=getattr(mx, request["dtype"]),
        distillation=distillation,
        group=team.group,
        **settings,
    )
    if request["has_moments"] and step.sharding is not None:
        step.sharding.deal_state(optimizer, state)
    mx.eval(optimizer.state)
    team.kept[_KEPT] = step
    return step


def _train(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> tuple[float, float]:
    """Make one step; return the loss and the gradients' norm."""
    step: TrainStep = team.kept[_KEPT]
    batch = Batch(*(np.array(arrays[name]) for name in ("ids", "targets", "weights")))
    return step(batch, Rates(*request["rates"]), request["iteration"])


def _gather_state(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> Flat:
    """Return the optimizer's whole state, on rank 0."""
    step: TrainStep = team.kept[_KEPT]
    assert step.sharding is not None
    return step.sharding.gather_state(step.optimizer)


def _end(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    """Forget the training."""
    del team.kept[_KEPT]


def _make_distillation(team: Team, told: dict[str, Any] | None, dtype: mx.Dtype) -> Distillation | None:
    """Return the teacher that rank 0 has."""
    if told is None:
        return None
    teacher: TeacherModel
    if "folder" in told:
        folder = Path(told["folder"])
        outside, _ = load_outside(folder)
        teacher = OutsideTeacher(outside.model, told["vocab_size"], folder)
    else:
        teacher = OwnTeacher(model_on(team, _TEACHER), dtype)
    return Distillation(teacher=teacher, mix=Mix(**told["mix"]), size=TeacherSize(**told["size"]))


def _name_of(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
