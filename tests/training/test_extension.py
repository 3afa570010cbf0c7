"""An extended training ends as if it had been longer from the start; warm starts take over the moments."""

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from kit import training
from kit.models import computing_on_cpu, make_model
from kit.training import Trained, make_optimizer, schedule
from mlxchat.errors import DataError, Interrupted
from mlxchat.training.state import load_moments

STATE = "training_state.safetensors"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Eight iterations at a constant rate."""
    with computing_on_cpu():
        return training.train(tmp_path_factory.mktemp("straight"), 8, keep_state=True)


def test_extensions_equal_one_training_bit_for_bit(straight, train):
    """An extension can be interrupted and extended; its records begin with those of what it extends."""
    short = train("short", 2, keep_state=True)
    longer = train("longer", 4, extends=short.ctx.out, keep_state=True)
    assert longer.ctx.resumed_from is None, "nothing of its own was interrupted"
    with pytest.raises(Interrupted, match="iteration 6 of 8"):
        train("longest", 8, extends=longer.ctx.out, stop_after=6)
    longest = train("longest", 8, extends=longer.ctx.out)
    assert longest.ctx.resumed_from == 6
    assert longest.bits == straight.bits
    assert longest.curve("loss") == straight.curve("loss")


def test_rates_follow_the_new_horizon_after_the_extended_iterations(train):
    falling = schedule(warmdown_frac=0.5)
    short = train("short", 4, rates=falling, keep_state=True)
    long = train("long", 8, extends=short.ctx.out, rates=falling)
    assert list(short.curve("lr_multiplier").values()) == pytest.approx([1, 1, 1, 0.5])
    assert list(long.curve("lr_multiplier").values()) == pytest.approx([1, 1, 1, 0.5, 1, 0.75, 0.5, 0.25])
    assert list(long.ctx.out.glob("training_state*")) == [], "keep_state is off"


def test_warm_start_takes_the_moments_and_not_the_rates(tmp_path):
    before, after = make_optimizer(make_model()), make_optimizer(make_model(), matrix_lr=0.007)
    rng = np.random.default_rng(3)
    for name, value in before.state.items():
        before.state[name] = mx.array(rng.normal(size=value.shape).astype(np.float32))
    with pytest.raises(DataError, match=r"save_training_state=true, or give warm_start=false"):
        load_moments(tmp_path, after)
    save_file({name: np.array(value) for name, value in before.state.items()}, tmp_path / STATE)
    load_moments(tmp_path, after)
    assert after.state.keys() == before.state.keys()
    assert all(np.array_equal(after.state[name], value) for name, value in before.state.items())
    assert after.muon_lr == pytest.approx(0.007)
