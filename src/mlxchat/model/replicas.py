"""The weights of rank 0 on every rank of a team.

Rank 0 calls `sync_model` before any call that needs the model. It sends what the ranks may not have: everything the
first time, later only parameters that are other arrays than last time, such as weights swapped in for an evaluation.
Weights that training has moved on all ranks (`moving_on_all`) are not sent again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, cast

import mlx.core as mx

from mlxchat.distributed.team import Team
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.lora import adapters_of, attach_adapters
from mlxchat.model.sizes import AdapterSizes, GPTSizes


def sync_model(team: Team | None, model: GPT, role: str = "model") -> None:
    """Give every rank the weights that `model` has now, bit for bit; on rank 0, and without effect if it is alone.

    `role` distinguishes the models of a step: model, teacher.
    """
    if team is None or team.size == 1:
        return
    parameters, adapters = flatten_parameters(model), adapters_of(model)
    shape = {"sizes": model.sizes.to_dict(), "names": list(parameters), "adapters": adapters and asdict(adapters)}
    known, equal = team.kept.get(f"{role} on all", (None, {}))
    changed = {name: value for name, value in parameters.items() if known != shape or equal.get(name) is not value}
    team.kept[f"{role} here"] = model
    if changed:
        team.call(_take, {"role": role, "shape": None if known == shape else shape}, changed)
    team.kept[f"{role} on all"] = (shape, parameters)


@contextmanager
def moving_on_all(team: Team, model: GPT) -> Iterator[None]:
    """Note that the body moves the weights of `model` alike on all ranks; the old ones are not kept in memory."""
    shape = team.kept["model on all"][0]
    team.kept["model on all"] = (shape, {})
    yield
    team.kept["model on all"] = (shape, flatten_parameters(model))


def model_on(team: Team, role: str = "model") -> GPT:
    """Return this rank's model; on rank 0 the one last given to `sync_model`."""
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
            targets = tuple(shape["adapters"]["targets"])
            attach_adapters(model, AdapterSizes(**shape["adapters"] | {"targets": targets}))
    set_parameters(team.kept[place], arrays)
