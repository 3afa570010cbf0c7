"""Trainings of several ranks: stopped, resumed by another number of ranks, extended, started warm."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from kit import ranks
from kit.models import make_model
from kit.training import NumberedBatches, make_context, make_optimizer, schedule
from mlxchat.config.schema import ScheduleConfig
from mlxchat.distributed.team import Team
from mlxchat.errors import Interrupted
from mlxchat.model.gpt import flatten_parameters, set_parameters
from mlxchat.training.best import Best
from mlxchat.training.loop import Hook, fit
from mlxchat.training.state import load_moments

SCHEDULE = schedule(warmup_frac=0.2, warmdown_frac=0.5)
CONSTANT = schedule()
NUM_ITERATIONS = 6


def train(
    team: Team | None, folder: str, name: str, *, stop_after: int | None = None, iterations: int = NUM_ITERATIONS,
    extends: str | None = None, warm: str | None = None, broken: int | None = None, keeps: bool = False,
    rates: ScheduleConfig = CONSTANT,
) -> dict[str, Any]:  # fmt: skip
    """Train, resuming an earlier attempt of this name; write weights and moments into its folder."""
    model = make_model()
    optimizer = make_optimizer(model)
    batches = NumberedBatches(rows=5, uneven=True, broken=set() if broken is None else {broken})
    ctx = make_context(
        Path(folder, name), stop_signal=lambda: 15 if stop_after is not None and batches.number >= stop_after else None,
        training={"on_nan": "skip"}, team=team, device_batch_tokens=32,
    )  # fmt: skip
    if warm is not None:
        load_moments(Path(folder, warm, "out"), optimizer)

    def look(iteration: int) -> dict[str, float]:
        # Other weights for a while, as in evaluations.
        own = flatten_parameters(model)
        set_parameters(model, {"lm_head.weight": mx.zeros(own["lm_head.weight"].shape)})
        set_parameters(model, own)
        return {"val_bpb": abs(iteration - 4) + 1.0} if keeps else {}

    with suppress(Interrupted):
        fit(
            ctx, model, optimizer, batches, num_iterations=iterations, schedule=rates, dropout=0.1, micro_tokens=32,
            hooks=[Hook(run=look, every=2)], keep_state=keeps,
            extends=None if extends is None else Path(folder, extends, "out"),
            best=Best(every=2, basis=8) if keeps else None,
        )  # fmt: skip
    if keeps:
        weights = {name: np.array(value) for name, value in flatten_parameters(model).items()}
        save_file(weights, ctx.out / "model.safetensors")
    arrays = {**flatten_parameters(model), **optimizer.whole_state()}
    np.savez(Path(folder, name, "arrays.npz"), **{key: np.array(value) for key, value in arrays.items()})
    found = ctx.records("metrics").read()
    keys = ("iteration", "loss", "grad_norm", "skipped_iterations")
    return {"records": [[record.get(key, -1) for key in keys] for record in found], "metrics": ctx.metrics}


def train_two(team: Team | None, folder: str) -> dict[str, Any]:
    found = {
        "straight": train(team, folder, "straight", rates=SCHEDULE),
        "stopped": train(team, folder, "stopped", stop_after=3, rates=SCHEDULE),
    }
    for number in (1, 3):
        shutil.copytree(Path(folder, "stopped"), Path(folder, f"left for {number}"))
    found["continued"] = train(team, folder, "stopped", rates=SCHEDULE)
    found["finished"] = train(team, folder, "finished", iterations=5, keeps=True)
    found["extended"] = train(team, folder, "extended", extends="finished", iterations=8, keeps=True)
    found["warm"] = train(team, folder, "warm", warm="finished", iterations=2)
    found["broken"] = train(team, folder, "broken", broken=2)
    return found


def resume(team: Team | None, folder: str, name: str) -> dict[str, Any]:
    return train(team, folder, name, rates=SCHEDULE)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    return folder, train_two(None, str(folder))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, ranks.lead_ranks(train_two, 2, str(folder))


def arrays_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / name / "arrays.npz") as found:
        return dict(found)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare records, losses and norms to 1e-5."""
    assert len(ours["records"]) == len(theirs["records"])
    for mine, other in zip(ours["records"], theirs["records"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Compare arrays to 1e-3 of their norm: six iterations of Adam amplify the rounding of small numbers."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert np.linalg.norm(ours[key] - value) <= 1e-3 * np.linalg.norm(value), key


@pytest.mark.parametrize("name", ["straight", "stopped", "continued", "finished", "extended", "warm", "broken"])
def test_two_ranks_train_as_one_process(name, one, two):
    assert_equal(two[1][name], one[1][name])
    place = "stopped" if name == "continued" else name
    assert_close(arrays_of(two[0], place), arrays_of(one[0], place))


def test_resume_with_two_ranks_is_bit_exact(two):
    folder, found = two
    straight, continued = arrays_of(folder, "straight"), arrays_of(folder, "stopped")
    assert all(straight[key].tobytes() == continued[key].tobytes() for key in straight)
    assert found["continued"]["records"] == found["straight"]["records"]


@pytest.mark.parametrize("number", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_resume_with_another_number_of_ranks(number, two, one):
    folder, name = two[0], f"left for {number}"
    found = resume(None, str(folder), name) if number == 1 else ranks.lead_ranks(resume, number, str(folder), name)
    assert_equal(found, one[1]["straight"])
    assert_close(arrays_of(folder, name), arrays_of(one[0], "straight"))


def test_ranks_skip_updates_and_restore_best_weights(two):
    records = two[1]["broken"]["records"]
    assert (records[2][1], records[2][3]) == (-1, 1)
    assert all(np.isfinite(record[1]) for record in records[3:])
    assert [two[1][name]["metrics"]["best_iteration"] for name in ("finished", "extended")] == [4, 4]
