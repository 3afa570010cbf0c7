"""A model on every rank of a team: one call makes sure that all have the weights of rank 0.

Rank 0 calls `sync_model` before it asks the ranks for anything that needs the model. It sends what is not known to be
equal: everything the first time, later only parameters that are other arrays than those of last time. So weights arrive
that were swapped in for an evaluation, or that rank 0 alone has changed; those that training has moved on all ranks
(`mark_equal`) do not travel again. Functions that the ranks are asked for take the model from `model_on`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import mlx.core as mx

from mlxchat.distributed.team import Team
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.lora import adapters_of, attach_adapters
from mlxchat.model.sizes import AdapterSizes, GPTSizes


def sync_model(team: Team | None, model: GPT, role: str = "model") -> None:
    """Give every rank the weights that `model` has now, bit for bit; called on rank 0.

    Args:
        team: of this step; None or a team of one: nothing is done.
        model: of rank 0, parameters of any type.
        role: under which ranks keep it, where they need several: model, reference, …

    Raises:
        PeerLost: another rank is gone.
    """
    if team is None or team.size == 1:
        return
    parameters = flatten_parameters(model)
    adapters = adapters_of(model)
    shape = {
        "sizes": model.sizes.to_dict(), "names": list(parameters), "adapters": adapters and asdict(adapters),
    }  # fmt: skip
    begins = team.kept.get(_shape_of(role)) != shape
    equal = {} if begins else team.kept.get(_equal_of(role), {})
    changed = {name: value for name, value in parameters.items() if equal.get(name) is not value}
    team.kept[_model_of(role)], team.kept[_shape_of(role)] = model, shape
    if changed:
        team.call(_take, {"role": role, **(shape if begins else {})}, changed)
    mark_equal(team, model, role)


def model_on(team: Team, role: str = "model") -> GPT:
    """Return this rank's model; on rank 0 the one that was last given to `sync_model`."""
    return cast(GPT, team.kept[_model_of(role)])


def mark_equal(team: Team | None, model: GPT, role: str = "model") -> None:
    """Note on rank 0 that all ranks have the weights that `model` has now; they were computed on each."""
    if team is not None and team.size > 1 and team.group.leads and team.kept.get(_model_of(role)) is model:
        team.kept[_equal_of(role)] = flatten_parameters(model)


def forget_equal(team: Team | None, role: str = "model") -> None:
    """Let go of arrays that are about to be replaced: they would lie in memory twice."""
    if team is not None:
        team.kept.pop(_equal_of(role), None)


def _take(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    """Set this rank's weights to those of rank 0; rank 0 has them."""
    if team.group.leads:
        return
    place = _model_of(request["role"])
    if "sizes" in request:
        team.kept.pop(place, None)
        model = team.kept[place] = GPT(GPTSizes(**request["sizes"]))
        if request["adapters"]:
            adapters = AdapterSizes(**request["adapters"] | {"targets": tuple(request["adapters"]["targets"])})
            attach_adapters(model, adapters)
    set_parameters(team.kept[place], arrays)


def _model_of(role: str) -> str:
    return f"model.{role}"


def _shape_of(role: str) -> str:
    return f"model.{role}.shape"


def _equal_of(role: str) -> str:
    return f"model.{role}.equal"
