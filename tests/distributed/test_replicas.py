"""A model's weights on every rank."""

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np

from kit import ranks
from mlxchat.distributed.team import Team
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.replicas import model_on, moving_on_all, sync_model
from mlxchat.model.sizes import GPTSizes

SIZES = GPTSizes(vocab_size=64, num_layers=2, num_heads=2, num_kv_heads=2, width=16, context_tokens=32, rope_theta=1e4)


def digest(model: GPT) -> str:
    found = hashlib.sha256()
    for name, value in sorted(flatten_parameters(model).items()):
        found.update(f"{name} {value.dtype} {value.shape}".encode() + np.array(value.view(mx.uint8)).tobytes())
    return found.hexdigest()


def digests(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[str]:
    """Return the digest of each rank's model."""
    del arrays
    return team.group.gather_json(digest(model_on(team, request["role"])))


def on_all(team: Team, role: str = "model") -> list[str]:
    return team.call(digests, {"role": role})


def weights_everywhere(team: Team) -> dict[str, Any]:
    """Change a model in several ways; return after each the number of sent arrays and all ranks' digests."""
    sent: list[int] = []
    call = team.call

    def counting(function: Any, request: Any = None, arrays: Any = None) -> Any:
        sent.append(len(arrays or {}))
        return call(function, request, arrays)

    team.call = counting  # type: ignore[method-assign]  # counts what is sent
    model, found = GPT(SIZES), {}

    def note(name: str, role: str = "model") -> None:
        sent.clear()
        sync_model(team, model, role)
        travelled = sum(sent)
        found[name] = [travelled, digest(model), *on_all(team, role)]

    note("first")
    note("again")
    flat = flatten_parameters(model)
    set_parameters(model, {"lm_head.weight": mx.full(flat["lm_head.weight"].shape, -0.0)})
    note("one swapped")
    set_parameters(model, flat)
    note("swapped back")
    set_parameters(model, {name: value.astype(mx.bfloat16) for name, value in flat.items()})
    note("other type")
    note("other role", "reference")
    with moving_on_all(team, model):
        set_parameters(model, {name: value + 0 for name, value in flat.items()})
    note("moved on all")
    return {"found": found, "parameters": len(flat)}


def test_only_changed_weights_are_sent():
    result = ranks.lead_ranks(weights_everywhere, 3)
    found, everything = result["found"], result["parameters"]
    sent = {name: values[0] for name, values in found.items()}
    assert sent == {
        "first": everything, "again": 0, "one swapped": 1, "swapped back": 1, "other type": everything,
        "other role": everything, "moved on all": 0,
    }  # fmt: skip
    for name, (_, *digests_of_ranks) in found.items():
        if name != "moved on all":
            assert len(digests_of_ranks) == 4
            assert len(set(digests_of_ranks)) == 1, name
