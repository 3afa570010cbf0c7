"""Dropout in a training step: where it acts, and what it does not depend on."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from kit.training import make_optimizer, make_rows
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes
from mlxchat.ops import dropout as dropout_module
from mlxchat.ops.device import Lanes, make_lanes
from mlxchat.ops.dropout import Dropping, draw_keys, dropping
from mlxchat.optim.optimizer import Optimizer, Rates
from mlxchat.training import step as step_module
from mlxchat.training.batches import Batch, mean_batch
from mlxchat.training.step import TrainStep

ROW_TOKENS, RATE, SEED = 16, 0.2, 9
RATES = Rates(1.0, 0.9, 1.0)


@pytest.fixture
def batch() -> Batch:
    return mean_batch(make_rows(6, seed=3))


@pytest.fixture
def set_lanes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make steps have so many lanes, whatever the machine has."""

    def make(count: int) -> Lanes:
        lanes = make_lanes()
        lanes.streams = [*lanes.streams[:1], *(mx.new_stream(mx.cpu) for _ in range(count - 1))]
        return lanes

    return lambda count: monkeypatch.setattr(step_module, "make_lanes", lambda: make(count))


def make_step(
    model: GPT, optimizer: Optimizer, *, dropout: float = RATE, micro_rows: int = 6, **more: bool
) -> TrainStep:
    return TrainStep(
        model,
        optimizer,
        micro_tokens=micro_rows * ROW_TOKENS,
        dtype=mx.float32,
        dropout=dropout,
        dropout_seed=SEED,
        **more,
    )


def reference_loss(model: GPT, batch: Batch, iteration: int) -> float:
    """The model's own forward pass over the whole batch at once, uncompiled, with masks cut from numpy's keys."""
    with dropping(Dropping(RATE, mx.array(draw_keys(SEED, iteration, rows=len(batch.ids))))):
        hidden = model.hidden(mx.array(batch.ids))
    logits = np.asarray(model.logits(hidden), dtype=np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float((np.take_along_axis(logs, batch.targets[..., None], -1)[..., 0] * batch.weights).sum())


@pytest.mark.parametrize(("lanes", "micro_rows"), [(1, 6), (2, 6), (3, 6), (2, 4), (1, 1)])
def test_what_is_left_out_depends_neither_on_lanes_nor_on_micro_batches(
    lanes: int,
    micro_rows: int,
    batch: Batch,
    set_lanes: Callable[[int], None],
) -> None:
    set_lanes(lanes)
    model = make_model()
    step = make_step(model, make_optimizer(model), micro_rows=micro_rows)
    for iteration in (0, 7):
        loss, _ = step.gradients(batch, iteration)
        assert float(loss.item()) == pytest.approx(reference_loss(model, batch, iteration), rel=1e-5)


def test_each_iteration_leaves_out_other_numbers_and_the_same_ones_when_it_is_done_again(batch: Batch) -> None:
    model = make_model()
    step = make_step(model, make_optimizer(model))
    losses = [float(step.gradients(batch, iteration)[0].item()) for iteration in (0, 1, 2, 1)]
    assert losses[3] == losses[1]
    assert len(set(losses)) == 3
    assert step.num_traces <= len(make_lanes()), "keys are arrays: nothing is compiled again"


def test_gradients_are_the_slopes_of_the_loss_with_what_is_left_out(batch: Batch) -> None:
    """Against central differences of the uncompiled model along a random direction of each parameter."""
    model = make_model()
    start = flatten_parameters(model)
    _, gradients = make_step(model, make_optimizer(model)).gradients(batch, 4)
    rng = np.random.default_rng(0)
    for name, value in start.items():
        direction = rng.normal(size=value.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        sides = []
        for sign in (1, -1):
            set_parameters(model, {name: value + sign * 0.01 * mx.array(direction)})
            sides.append(reference_loss(model, batch, 4))
        set_parameters(model, {name: value})
        slope = float((np.asarray(gradients[name]) * direction).sum())
        assert slope == pytest.approx((sides[0] - sides[1]) / 0.02, rel=0.02, abs=3e-5), name


def test_recomputing_layers_leaves_out_the_same_numbers_bit_for_bit(batch: Batch) -> None:
    outcomes = []
    for recompute in (False, True):
        model = make_model()
        step = make_step(model, make_optimizer(model), recompute=recompute)
        numbers = [step(batch, RATES, iteration) for iteration in range(3)]
        outcomes.append(
            (numbers, {name: np.array(value).tobytes() for name, value in flatten_parameters(model).items()})
        )
    assert outcomes[0] == outcomes[1]


def test_a_rate_of_zero_gives_the_bits_of_a_step_without_dropout(batch: Batch) -> None:
    outcomes = []
    for settings in ({}, {"dropout": 0.0, "dropout_seed": 3}):
        model = make_model()
        step = TrainStep(model, make_optimizer(model), micro_tokens=64, dtype=mx.float32, **settings)
        numbers = [step(batch, RATES, iteration) for iteration in range(3)]
        outcomes.append(
            (numbers, {name: np.array(value).tobytes() for name, value in flatten_parameters(model).items()})
        )
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_places_are_the_embedding_and_what_each_attention_and_mlp_adds(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other keys at any one of them give other states."""
    features = {"value_embeddings": True, "residual_scalars": True, "smear": True, "backout": True}
    model = GPT(
        GPTSizes(
            vocab_size=40, num_layers=3, num_heads=2, num_kv_heads=2, width=32, context_tokens=16, rope_theta=1e4,
            **(features if architecture == "jul2026" else {}),
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(size=value.shape) for name, value in flatten_parameters(model).items()}
    set_parameters(model, {name: mx.array(value.astype(np.float32)) for name, value in drawn.items()})
    ids = mx.array(rng.integers(0, 40, (2, 16)))
    keys, fold = mx.array(draw_keys(0, 0, rows=2)), dropout_module.fold

    def hidden(changed: int | None = None) -> np.ndarray:
        monkeypatch.setattr(dropout_module, "fold", lambda keys, place: fold(keys, place + 1000 * (place == changed)))
        with dropping(Dropping(0.3, keys)):
            return np.asarray(model.hidden(ids))

    whole, num_places = hidden(), 1 + 2 * model.sizes.num_layers
    assert [(hidden(place) != whole).any() for place in range(num_places + 1)] == [True] * num_places + [False]
