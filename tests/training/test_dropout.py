"""Dropout: statistics of its masks, what they depend on, and where it acts."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from kit.training import make_optimizer, make_rows
from mlxchat.data.packing import Batch, mean_batch
from mlxchat.model import forward
from mlxchat.model.forward import Dropping, draw_keys, dropped, dropping
from mlxchat.model.gpt import GPT
from mlxchat.training.step import TrainStep

ROW_TOKENS, RATE, SEED = 16, 0.2, 9


@pytest.fixture
def batch() -> Batch:
    return mean_batch(make_rows(6, seed=3))


def make_step(model: GPT, *, micro_rows: int = 6, **options: Any) -> TrainStep:
    return TrainStep(
        model, make_optimizer(model), micro_tokens=micro_rows * ROW_TOKENS, dtype=mx.float32,
        **{"dropout": RATE, "dropout_seed": SEED, **options},
    )  # fmt: skip


@pytest.mark.parametrize("rate", [0.001, 0.5, 0.9])
def test_dropped_share_is_the_rate_and_the_mean_is_kept(rate):
    """Of 2.1 million numbers: within five standard deviations of a binomial draw."""
    out = np.asarray(dropped(mx.ones((16, 256, 512)), mx.array(draw_keys(1, 2, rows=16)), rate))
    deviation = (rate * (1 - rate) / out.size) ** 0.5
    assert abs((out == 0).mean() - rate) < 5 * deviation
    assert out.mean(dtype=np.float64) == pytest.approx(1, abs=5 * deviation / (1 - rate) + 1e-7)


def reference_loss(model: GPT, batch: Batch, iteration: int) -> float:
    """Return the loss of the uncompiled model over the whole batch at once."""
    with dropping(Dropping(RATE, mx.array(draw_keys(SEED, iteration, rows=len(batch.ids))))):
        hidden = model.hidden(mx.array(batch.ids))
    logits = np.asarray(model.logits(hidden), dtype=np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float((np.take_along_axis(logs, batch.targets[..., None], -1)[..., 0] * batch.weights).sum())


@pytest.mark.parametrize(("lanes", "micro_rows"), [(1, 6), (2, 4), (3, 6)])
def test_masks_depend_neither_on_lanes_nor_on_micro_batches(lanes, micro_rows, batch, set_lanes):
    """They depend on the iteration, of which two give two losses; nothing is compiled again."""
    set_lanes(lanes)
    model = make_model()
    step = make_step(model, micro_rows=micro_rows)
    losses = [float(step.gradients(batch, iteration)[0].item()) for iteration in (0, 7, 0)]
    traces = step.num_traces
    assert losses[0] == losses[2] != losses[1]
    for iteration, loss in ((0, losses[0]), (7, losses[1])):
        assert loss == pytest.approx(reference_loss(model, batch, iteration), rel=1e-5)
    step.gradients(batch, 8)
    assert step.num_traces == traces


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_dropout_acts_on_the_embedding_and_each_attention_and_mlp(architecture, monkeypatch):
    """Other keys at any of these places give other states."""
    model = make_model(architecture, num_layers=3, scale=1.0)
    ids = mx.array(np.random.default_rng(0).integers(0, 40, (2, 16)))
    keys, fold = mx.array(draw_keys(0, 0, rows=2)), forward.fold

    def hidden(changed: int | None = None) -> np.ndarray:
        monkeypatch.setattr(forward, "fold", lambda keys, place: fold(keys, place + 1000 * (place == changed)))
        with dropping(Dropping(0.3, keys)):
            return np.asarray(model.hidden(ids))

    whole, num_places = hidden(), 1 + 2 * model.sizes.num_layers
    assert [(hidden(place) != whole).any() for place in range(num_places + 1)] == [True] * num_places + [False]
