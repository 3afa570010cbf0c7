"""Several ranks train the same adapters as one process, on the same base."""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit import ranks
from kit.models import make_model
from kit.training import make_rows, optimizer_config
from mlxchat.cpu import runtime
from mlxchat.distributed.team import Team
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters, trained_parameters
from mlxchat.model.lora import attach_adapters
from mlxchat.model.replicas import model_on
from mlxchat.model.sizes import AdapterSizes, resolve_targets
from mlxchat.optim.optimizer import AdamWRule, Optimizer, Rates
from mlxchat.rl.scores import PolicyScores
from mlxchat.training.batches import mean_batch
from mlxchat.training.team_step import make_step

KINDS = {"lora": ("lora", None), "dora on 4 bits": ("dora", 4)}


def train(team: Team, name: str) -> dict[str, Any]:
    """Train adapters for three steps; return losses, adapters, scores before and after, and digests of ranks."""
    runtime.set_blas_threads(1)
    kind, bits = KINDS[name]
    model = make_model(vocab_size=281)
    rng = np.random.default_rng(7)

    def moved(parameters: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return parameters with random numbers added, none of which is zero."""
        return {
            name: value + mx.array(rng.normal(0, 0.1, value.shape).astype(np.float32))
            for name, value in parameters.items()
        }

    sizes = AdapterSizes(kind, 3, 2.0, resolve_targets(["all"], model.sizes), bits, 32, dropout=0.2)
    attach_adapters(model, sizes, seed=1)
    set_parameters(model, moved(trained_parameters(model)))
    reference = trained_parameters(model)
    optimizer = Optimizer(model, optimizer_config(), width=32, adapter=AdamWRule(1e-2, (0.9, 0.999), 0.01))
    step = make_step(team, model, optimizer, micro_tokens=48, dtype=mx.float32, dropout_seed=5)
    steps = []
    for index in range(3):
        batch = mean_batch(make_rows(7, seed=index))
        steps.append(step(batch, Rates(1.0, 0.9, 1.0), index))
    scores = PolicyScores(model, micro_tokens=64, dtype=mx.float32, team=team)
    before, _ = scores(batch.ids, batch.targets, reference)
    after, _ = scores(batch.ids, batch.targets)
    return {
        "steps": steps,
        "adapters": {key: np.array(value).tolist() for key, value in trained_parameters(model).items()},
        "scores": [before.tolist(), after.tolist()],
        "digests": team.call(look) if team.size > 1 else [],
        "digest": digest(model),
    }


def digest(model: GPT) -> str:
    arrays = flatten_parameters(model)
    return hashlib.sha256(b"".join(np.array(arrays[name]).tobytes() for name in sorted(arrays))).hexdigest()


def look(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[str]:
    """Return each rank's digest of all its weights."""
    return team.group.gather_json(digest(model_on(team)))


def train_all(team: Team) -> dict[str, Any]:
    return {name: train(team, name) for name in KINDS}


@pytest.fixture(scope="module")
def together() -> dict[str, Any]:
    return dict(ranks.lead_ranks(train_all, 2))


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_train_adapters_as_one_process(name: str, together: dict[str, Any]) -> None:
    found, expected = together[name], train(Team(), name)
    np.testing.assert_allclose(found["steps"], expected["steps"], rtol=1e-5)
    for key, value in expected["adapters"].items():
        apart = np.linalg.norm(np.array(found["adapters"][key]) - np.array(value))
        assert apart <= 1e-3 * np.linalg.norm(value), key
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=2e-3)
    assert set(found["digests"]) == {found["digest"]}
