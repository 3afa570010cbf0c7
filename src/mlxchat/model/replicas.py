"""Copies rank 0's weights to every rank of a team.

Rank 0 calls `sync_model` before each call that needs the model. It sends everything the first time, later only
parameters that are other arrays than last time, such as those that a training has updated.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import mlx.core as mx

from mlxchat.config.schema import AdapterConfig
from mlxchat.distributed.team import Team
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import adapters_of, attach_adapters
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes


def sync_model(team: Team | None, model: GPT, role: str = "model") -> None:
    """Send the current weights of a model from rank 0 to all, if there are several; a step's roles: model, teacher."""
    if team is None or team.size == 1:
        return
    parameters, adapters = flatten_parameters(model), adapters_of(model)
    shape = {"sizes": asdict(model.sizes), "names": list(parameters), "adapters": adapters and asdict(adapters)}
    known, equal = team.kept.get(f"{role} on all", (None, {}))
    changed = {name: value for name, value in parameters.items() if known != shape or equal.get(name) is not value}
    team.kept[f"{role} here"] = model
    if changed:
        team.call(_take, {"role": role, "shape": None if known == shape else shape}, changed)
    team.kept[f"{role} on all"] = (shape, parameters)


def model_on(team: Team, role: str = "model") -> GPT:
    """Return this rank's model; on rank 0 the last argument of `sync_model`."""
    return cast(GPT, team.kept[f"{role} here"])


def _take(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    """Set this rank's weights to those of rank 0."""
    if team.group.leads:
        return
    place, shape = f"{request['role']} here", request["shape"]
    if shape is not None:
        team.kept.pop(place, None)
        model = team.kept[place] = GPT(GPTSizes(**shape["sizes"]))
        if shape["adapters"]:
            attach_adapters(model, AdapterConfig(**shape["adapters"]))
    set_parameters(team.kept[place], arrays)
