"""Training steps of several ranks equal those of one process: losses, norms, weights, moments."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from distributed import ranks
from kit import models
from kit.training import optimizer_config
from mlxchat.config.schema import AdapterConfig, TeacherConfig
from mlxchat.cpu import runtime
from mlxchat.data.packing import Batch, mean_batch
from mlxchat.distributed.team import Team
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import attach_adapters
from mlxchat.model.parameters import flatten_parameters, set_parameters, trained_parameters
from mlxchat.model.sizes import resolve_targets
from mlxchat.optim.optimizer import AdamWRule, Optimizer, Rates
from mlxchat.training.step import Distillation, TeamStep, TrainStep

TOKENS, VOCABULARY = 16, 281  # no multiple of any number of ranks
make_model = partial(models.make_model, vocab_size=VOCABULARY)
# Three layers: of two, the middle one would be the last, and the final norm would cancel its backout.
JUL = {"architecture": "jul2026", "num_layers": 3, "vocab_multiple": 8, "window_pattern": "SL"}
UNEVEN = [16, 2, 9, 0, 16, 5, 1]
CASES: dict[str, dict[str, Any]] = {
    "jul2026": {"sizes": JUL, "optimizer": {"variant": "jul2026"}},
    "clipped, unequal numbers of targets": {"targets": UNEVEN, "micro_rows": 2, "optimizer": {"grad_clip": 0.01}},
    "dropout": {"dropout": 0.3, "micro_rows": 1},
    "a teacher, ranks without a row": {"teacher": True, "targets": [9]},
    "DoRA on 4 bits": {"adapters": ("dora", 4), "dropout": 0.2},
}
SETTINGS = {"micro_rows": 3, "targets": [16, 16, 16, 16, 16, 16], "sizes": {}, "optimizer": {}}


def make_optimizer(model: GPT, rule: AdamWRule | None, **changes: Any) -> Optimizer:
    config = optimizer_config(**changes)
    return Optimizer(model, config, width=32, lr_frac=0.7, batch_lr_scale=1.1, weight_decay=0.05, adapter=rule)


def attach(model: GPT, kind: str, bits: int | None) -> AdamWRule:
    """Attach adapters without zeros; return their rule."""
    sizes = AdapterConfig(
        kind=kind, rank=3, targets=resolve_targets(["all"], model.sizes), bits=bits, group_size=32, dropout=0.2
    )
    attach_adapters(model, sizes, seed=1)
    rng = np.random.default_rng(7)
    moved = {
        name: value + mx.array(rng.normal(0, 0.1, value.shape).astype(np.float32))
        for name, value in trained_parameters(model).items()
    }
    set_parameters(model, moved)
    return AdamWRule(1e-2, (0.9, 0.999), 0.01)


def make_batch(seed: int, targets: list[int]) -> Batch:
    rows = []
    rng = np.random.default_rng(seed)
    for count in targets:
        ids = rng.integers(0, VOCABULARY, TOKENS + 1).astype(np.int32)
        rows.append((ids[:-1], np.where(np.arange(TOKENS) < count, ids[1:], -1).astype(np.int32)))
    return mean_batch(rows)


def train_case(team: Team, name: str, folder: str) -> dict[str, Any]:
    """Train on three batches; write weights and moments into the folder."""
    runtime.set_blas_threads(1)
    case = {**SETTINGS, **CASES[name]}
    model = make_model(**case["sizes"])
    rule = attach(model, *case["adapters"]) if "adapters" in case else None
    optimizer = make_optimizer(model, rule, **case["optimizer"])
    distillation = None
    if case.get("teacher"):
        distillation = Distillation(make_model(seed=8), TeacherConfig(weight=0.5, temperature=2.0), mx.float32)
    settings = {"micro_tokens": case["micro_rows"] * TOKENS, "dtype": mx.float32, "dropout_seed": 5}
    settings |= {"dropout": case.get("dropout", 0.0), "distillation": distillation}
    make = partial(TeamStep, team) if team.size > 1 else TrainStep
    step: Any = make(model, optimizer, **settings)
    steps, parts = [], []
    for index in range(3):
        batch = make_batch(index, case["targets"])
        steps.append(step(batch, Rates(1.0, 0.9, 1.0), index))
        parts.append(step.loss_parts)
    arrays = {**flatten_parameters(model), **optimizer.state}
    np.savez(Path(folder) / f"{name}.npz", **{key: np.array(value) for key, value in arrays.items()})
    return {"steps": steps, "parts": parts}


def train_all(team: Team, folder: str) -> dict[str, Any]:
    return {name: train_case(team, name, folder) for name in CASES}


@cache
def alone(name: str, folder: str) -> dict[str, Any]:
    return train_case(Team(), name, folder)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, ranks.lead_ranks(train_all, 3, str(folder))


def arrays_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as found:
        return dict(found)


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(name, together, one_folder):
    """Losses and norms to 1e-5, because sums are in another order; arrays to 5e-4 of their norm, because AdamW divides
    by roots of tiny numbers."""
    folder, found = together
    expected = alone(name, str(one_folder))
    np.testing.assert_allclose(found[name]["steps"], expected["steps"], rtol=1e-5)
    for ours, theirs in zip(found[name]["parts"], expected["parts"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = arrays_of(folder, name), arrays_of(one_folder, name)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].shape == value.shape, key
        assert np.linalg.norm(ours[key] - value) <= 5e-4 * np.linalg.norm(value), key
