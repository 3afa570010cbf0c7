"""Trainings of several ranks, stopped and resumed by another number of ranks."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed import ranks
from kit import training
from kit.models import make_model
from kit.training import NumberedBatches, make_optimizer, schedule
from mlxchat.distributed.team import Team
from mlxchat.errors import Interrupted
from mlxchat.model.parameters import flatten_parameters


def train(team: Team | None, folder: str, name: str, stop_after: int | None = None) -> list[list[float]]:
    """Train, resuming an earlier attempt of this name; return metrics, write weights and moments into its folder."""
    model = make_model()
    optimizer = make_optimizer(model)
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


def arrays_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / name / "arrays.npz") as found:
        return dict(found)


def assert_equal(one: tuple[Path, list[list[float]]], folder: Path, name: str, records: list[list[float]]) -> None:
    """Compare losses and norms to 1e-5, arrays to 1e-3 of their norm: Adam amplifies the rounding of small numbers."""
    assert len(records) == len(one[1])
    for mine, other in zip(records, one[1], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    ours, theirs = arrays_of(folder, name), arrays_of(one[0], "straight")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert np.linalg.norm(ours[key] - value) <= 1e-3 * np.linalg.norm(value), key


def test_two_ranks_train_as_one_process(one, two):
    """Also past an update that all ranks skip because of a loss that is not a number."""
    assert (one[1][2][1], one[1][2][3]) == (-1, 1)
    assert_equal(one, two[0], "straight", two[1]["straight"])


def test_resume_with_two_ranks_is_bit_exact(two):
    folder, found = two
    straight, continued = arrays_of(folder, "straight"), arrays_of(folder, "stopped")
    assert all(straight[key].tobytes() == continued[key].tobytes() for key in straight)
    assert found["continued"] == found["straight"]


def test_one_process_continues_what_two_ranks_began(two, one):
    folder, name = two[0], "left for one"
    assert_equal(one, folder, name, train(None, str(folder), name))
