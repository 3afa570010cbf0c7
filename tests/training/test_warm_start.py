"""Fine-tuning may go on with pretraining's moments, without its clipping, and with its batch."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from kit.models import make_model
from kit.training import make_optimizer
from mlxchat.errors import DataError
from mlxchat.optim.optimizer import Optimizer
from mlxchat.training.state import load_moments


@pytest.fixture
def pretrained(tmp_path: Path) -> tuple[Path, Optimizer]:
    """A folder with the moments of an optimizer, all of them random."""
    optimizer = make_optimizer(make_model())
    rng = np.random.default_rng(3)
    for name, value in optimizer.state.items():
        optimizer.state[name] = mx.array(rng.normal(size=value.shape).astype(np.float32))
    moments = {name: np.array(value) for name, value in optimizer.state.items()}
    save_file(moments, tmp_path / "training_state.safetensors")
    return tmp_path, optimizer


def test_a_warm_start_has_all_moments_of_the_pretraining_and_none_of_its_rates(
    pretrained: tuple[Path, Optimizer],
) -> None:
    folder, before = pretrained
    after = make_optimizer(make_model(), matrix_lr=0.007)
    load_moments(folder, after)
    assert after.state.keys() == before.state.keys()
    assert all(np.array_equal(after.state[name], value) for name, value in before.state.items())
    assert after.muon_lr == pytest.approx(0.007)


def test_a_warm_start_without_moments_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"save_training_state=true, or give warm_start=false"):
        load_moments(tmp_path, make_optimizer(make_model()))


def test_moments_of_another_model_are_refused(pretrained: tuple[Path, Optimizer]) -> None:
    folder, before = pretrained
    changed = {name: np.zeros((*value.shape, 2), np.float32) for name, value in before.state.items()}
    save_file(changed, folder / "training_state.safetensors")
    with pytest.raises(DataError, match="other arrays are needed"):
        load_moments(folder, make_optimizer(make_model()))
