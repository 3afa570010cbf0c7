"""Training steps of several ranks equal those of one process: losses, norms, weights, moments."""

import json
import shutil
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from distributed import ranks
from kit import models, training
from kit.training import NumberedBatches, optimizer_config, schedule
from mlxchat.config.schema import AdapterConfig, TeacherConfig
from mlxchat.cpu import runtime
from mlxchat.data.packing import Batch, mean_batch
from mlxchat.distributed.team import Team
from mlxchat.errors import Interrupted
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


# Trainings of several ranks, stopped and resumed by another number of ranks


def train(team: Team | None, folder: str, name: str, stop_after: int | None = None) -> list[list[float]]:
    """Train, resuming an earlier attempt of this name; return metrics, write weights and moments into its folder."""
    model = models.make_model()
    optimizer = training.make_optimizer(model)
    batches = NumberedBatches(rows=5, uneven=True, broken={2})
    context = {"training": {"on_nan": "skip"}, "team": team, "device_batch_tokens": 32}
    rates = schedule(warmup_frac=0.2, warmdown_frac=0.5)
    with suppress(Interrupted):
        training.train(
            Path(folder, name), model=model, optimizer=optimizer, batches=batches, context=context, rates=rates,
            dropout=0.1, stop_after=stop_after, micro_tokens=32,
        )  # fmt: skip
    arrays = {**flatten_parameters(model), **optimizer.state}
    np.savez(Path(folder, name, "arrays.npz"), **{key: np.array(value) for key, value in arrays.items()})
    keys = ("iteration", "loss", "grad_norm", "skipped_iterations")
    lines = Path(folder, name, "work", "records", "metrics.jsonl").read_text().splitlines()
    return [[record.get(key, -1) for key in keys] for record in map(json.loads, lines)]


def train_and_stop(team: Team | None, folder: str) -> dict[str, Any]:
    found = {"straight": train(team, folder, "straight"), "stopped": train(team, folder, "stopped", stop_after=4)}
    shutil.copytree(Path(folder, "stopped"), Path(folder, "left for one"))
    return {**found, "continued": train(team, folder, "stopped")}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]]]:
    folder = tmp_path_factory.mktemp("one")
    return folder, train(None, str(folder), "straight")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, ranks.lead_ranks(train_and_stop, 2, str(folder))


def read_arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / name / "arrays.npz") as found:
        return dict(found)


def assert_equal(one: tuple[Path, list[list[float]]], folder: Path, name: str, records: list[list[float]]) -> None:
    """Compare losses and norms to 1e-5, arrays to 1e-3 of their norm: Adam amplifies the rounding of small numbers."""
    assert len(records) == len(one[1])
    for mine, other in zip(records, one[1], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    ours, theirs = read_arrays(folder, name), read_arrays(one[0], "straight")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert np.linalg.norm(ours[key] - value) <= 1e-3 * np.linalg.norm(value), key


def test_two_ranks_train_as_one_process(one, two):
    """Also past an update that all ranks skip because of a loss that is not a number."""
    assert (one[1][2][1], one[1][2][3]) == (-1, 1)
    assert_equal(one, two[0], "straight", two[1]["straight"])


def test_resume_with_two_ranks_is_bit_exact(two):
    folder, found = two
    straight, continued = read_arrays(folder, "straight"), read_arrays(folder, "stopped")
    assert all(straight[key].tobytes() == continued[key].tobytes() for key in straight)
    assert found["continued"] == found["straight"]


def test_one_process_continues_what_two_ranks_began(two, one):
    folder, name = two[0], "left for one"
    assert_equal(one, folder, name, train(None, str(folder), name))
