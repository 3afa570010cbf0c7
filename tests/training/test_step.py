"""One iteration: the micro-batches do not matter, every target counts once, and the masters stay float32."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from kit.training import make_optimizer
from mlxchat.cpu import runtime
from mlxchat.data.packing import IGNORED
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.ops.device import Lanes, make_lanes
from mlxchat.ops.loss import token_losses
from mlxchat.optim.optimizer import Optimizer, Rates
from mlxchat.training import step as step_module
from mlxchat.training.batches import Batch, mean_batch
from mlxchat.training.step import TrainStep

ROW_TOKENS = 16


def rows(count: int, *, seed: int = 0, targets_per_row: list[int] | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random rows; where numbers are given, only so many targets of each row count."""
    rng, made = np.random.default_rng(seed), []
    for row in range(count):
        ids = rng.integers(0, 280, ROW_TOKENS + 1).astype(np.int32)
        targets = ids[1:].copy()
        if targets_per_row is not None:
            targets[targets_per_row[row] :] = IGNORED
        made.append((ids[:-1], targets))
    return made


@pytest.fixture
def set_lanes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make steps have so many lanes, whatever the machine has."""

    def make(count: int) -> Lanes:
        lanes = make_lanes()
        missing = max(0, count - len(lanes))
        lanes.streams = [*lanes.streams[:count], *(mx.new_stream(mx.cpu) for _ in range(missing))]
        return lanes

    return lambda count: monkeypatch.setattr(step_module, "make_lanes", lambda: make(count))


def losses_of(model: GPT, batch: Batch) -> np.ndarray:
    hidden = model.hidden(mx.array(batch.ids)).reshape(-1, model.sizes.width)
    return np.asarray(token_losses(hidden, model.lm_head.weight, mx.array(batch.targets.reshape(-1))))


def arrays(model: GPT) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in flatten_parameters(model).items()}


def train(
    model: GPT, optimizer: Optimizer, batches: list[Batch], *, micro_rows: int = 100, dtype: mx.Dtype = mx.float32
) -> list[tuple[float, float]]:
    step = TrainStep(model, optimizer, micro_tokens=micro_rows * ROW_TOKENS, dtype=dtype)
    return [step(batch, Rates(1.0, 0.9, 1.0)) for batch in batches]


# The loss


@pytest.mark.parametrize("micro_rows", [1, 2, 100])
def test_the_loss_is_the_mean_over_all_targets_whatever_row_they_are_in(micro_rows: int) -> None:
    """The mean of the micro-batches' means, which nanochat takes, would be another number."""
    model = make_model()
    batch = mean_batch(rows(4, targets_per_row=[16, 1, 3, 0]))
    losses = losses_of(model, batch)
    ((loss, _),) = train(model, make_optimizer(model), [batch], micro_rows=micro_rows)
    assert loss == pytest.approx(losses.sum() / 20, rel=1e-5)
    means = [losses[:16].mean(), losses[16:17].mean(), losses[32:35].mean()]
    assert abs(loss - np.mean(means)) > 1e-3


def test_a_batch_weighs_each_target_alike_and_ignored_ones_not() -> None:
    batch = mean_batch(rows(3, targets_per_row=[5, 0, 3]))
    assert batch.weights.dtype == np.float32
    assert batch.weights.sum() == pytest.approx(1)
    assert ((batch.weights > 0) == (batch.targets >= 0)).all()
    assert len(set(batch.weights[batch.weights > 0].tolist())) == 1


def test_a_batch_without_targets_changes_nothing() -> None:
    model = make_model()
    before = arrays(model)
    assert train(model, make_optimizer(model), [mean_batch(rows(2, targets_per_row=[0, 0]))]) == [(0.0, 0.0)]
    for name, value in arrays(model).items():
        np.testing.assert_array_equal(value, before[name])


# Gradients


def test_gradients_are_the_slopes_of_the_loss(path: str) -> None:
    """Against central differences along a random direction of each parameter."""
    model, batch = make_model(), mean_batch(rows(3))
    start = flatten_parameters(model)
    step = TrainStep(model, make_optimizer(model), micro_tokens=1000, dtype=mx.float32)
    _, gradients = step.gradients(batch)
    rng = np.random.default_rng(0)
    for name, value in start.items():
        direction = rng.normal(size=value.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        # A part of the gradient, so that the slope is not lost in rounding.
        direction += np.asarray(gradients[name]) / np.linalg.norm(np.asarray(gradients[name]))
        ends = []
        for sign in (1, -1):
            set_parameters(model, start | {name: value + sign * 1e-2 * mx.array(direction)})
            ends.append(losses_of(model, batch).astype(np.float64).mean())
        set_parameters(model, start)
        slope = float((np.asarray(gradients[name]) * direction).sum())
        # Differences of 0.01 in float32 are good for about one percent.
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2), name


def test_the_norm_is_reported_before_clipping() -> None:
    model, batch = make_model(), mean_batch(rows(3))
    step = TrainStep(model, make_optimizer(model, grad_clip=0.01), micro_tokens=1000, dtype=mx.float32)
    _, gradients = step.gradients(batch)
    expected = np.sqrt(sum((np.asarray(value, dtype=np.float64) ** 2).sum() for value in gradients.values()))
    assert step(batch, Rates(1.0, 0.9, 1.0))[1] == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1


def test_weights_of_zero_take_a_row_out() -> None:
    made = rows(3)
    few, many = mean_batch(made[:2]), mean_batch(made)
    padded = Batch(many.ids, many.targets, np.concatenate([few.weights, np.zeros((1, ROW_TOKENS), np.float32)]))
    first, second = make_model(), make_model()
    (one,), (other,) = train(first, make_optimizer(first), [few]), train(second, make_optimizer(second), [padded])
    assert one == pytest.approx(other, rel=1e-5)


# Micro-batches


@pytest.mark.parametrize("micro_rows", [1, 2, 3, 4, 5])
def test_accumulation_equals_the_whole_batch(micro_rows: int) -> None:
    """Also where the last micro-batch is smaller."""
    batches = [mean_batch(rows(6, seed=seed, targets_per_row=[16, 2, 9, 0, 16, 5])) for seed in range(3)]
    whole, parts, start = make_model(), make_model(), arrays(make_model())
    expected = train(whole, make_optimizer(whole), batches)
    got = train(parts, make_optimizer(parts), batches, micro_rows=micro_rows)
    # Other sums of the same float32 numbers; Adam's root and Muon's iteration amplify the rounding.
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    for name, value in arrays(whole).items():
        moved = np.linalg.norm(value - start[name])
        assert np.linalg.norm(arrays(parts)[name] - value) < 2e-3 * moved, name


def test_a_row_longer_than_a_micro_batch_is_computed_all_the_same() -> None:
    model = make_model()
    step = TrainStep(model, make_optimizer(model), micro_tokens=1, dtype=mx.float32)
    assert np.isfinite(step(mean_batch(rows(2)), Rates(1.0, 0.9, 1.0))).all()


# Lanes


@pytest.mark.parametrize("variant", ["oct2025", "jul2026"])
@pytest.mark.parametrize("micro_rows", [100, 4])
@pytest.mark.parametrize("num_lanes", [2, 3])
def test_lanes_give_what_one_gives(
    set_lanes: Callable[[int], None],
    num_lanes: int, micro_rows: int, variant: str,
) -> None:  # fmt: skip
    """Seven rows, so that lanes have unlike parts, and in micro-batches of four the last one has other parts."""
    batches = [mean_batch(rows(7, seed=seed, targets_per_row=[16, 2, 9, 0, 16, 5, 1])) for seed in range(2)]
    one, other = make_model(), make_model()
    set_lanes(1)
    expected = train(one, make_optimizer(one, variant=variant), batches, micro_rows=micro_rows)
    set_lanes(num_lanes)
    got = train(other, make_optimizer(other, variant=variant), batches, micro_rows=micro_rows)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for name, value in arrays(one).items():
        assert np.linalg.norm(arrays(other)[name] - value) < 1e-5 * np.linalg.norm(value), name


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
def test_the_same_lanes_give_the_same_bits(set_lanes: Callable[[int], None], num_lanes: int) -> None:
    set_lanes(num_lanes)
    batches = [mean_batch(rows(7, seed=seed)) for seed in range(3)]
    one, other = make_model(), make_model()
    first, second = train(one, make_optimizer(one), batches), train(other, make_optimizer(other), batches)
    assert first == second
    for name, value in arrays(one).items():
        np.testing.assert_array_equal(arrays(other)[name], value)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_fewer_rows_than_lanes_are_trained_on(set_lanes: Callable[[int], None], num_rows: int) -> None:
    batch, results = mean_batch(rows(num_rows)), []
    for num_lanes in (1, 3):
        set_lanes(num_lanes)
        model = make_model()
        results.append(train(model, make_optimizer(model), [batch]))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


@pytest.mark.skipif(runtime.blas_threads() is None, reason="no OpenBLAS here")
def test_the_threads_of_products_come_back_after_a_step_and_after_an_error(set_lanes: Callable[[int], None]) -> None:
    before = runtime.blas_threads()
    assert before is not None
    set_lanes(2)
    model = make_model()
    step = TrainStep(model, make_optimizer(model), micro_tokens=1000, dtype=mx.float32)
    runtime.set_blas_threads(2)
    try:
        step(mean_batch(rows(4)), Rates(1.0, 0.9, 1.0))
        assert runtime.blas_threads() == 2
        bad = mean_batch(rows(4))
        with pytest.raises(ValueError, match="shape"):
            step(Batch(bad.ids, bad.targets, bad.weights[:, :-1]), Rates(1.0, 0.9, 1.0))
        assert runtime.blas_threads() == 2
    finally:
        runtime.set_blas_threads(before)


# Compilation


@pytest.mark.parametrize(
    ("num_lanes", "micro_rows", "traces"), [(1, 100, 1), (1, 2, 1), (1, 4, 2), (2, 100, 2), (2, 4, 4), (3, 2, 2)]
)
def test_changing_rates_and_data_trace_nothing_again(
    set_lanes: Callable[[int], None], monkeypatch: pytest.MonkeyPatch,
    num_lanes: int, micro_rows: int, traces: int,
) -> None:  # fmt: skip
    """One trace per shape and lane: six rows by four leave a micro-batch of two; one of two rows takes two lanes."""
    set_lanes(num_lanes)
    moves, move = [], Optimizer.move
    monkeypatch.setattr(Optimizer, "move", lambda *arguments: (moves.append(1), move(*arguments))[1])
    model = make_model()
    optimizer = make_optimizer(model)
    step = TrainStep(model, optimizer, micro_tokens=micro_rows * ROW_TOKENS, dtype=mx.float32)
    traced = []
    for iteration in range(4):
        rates = Rates(1.0 - 0.1 * iteration, 0.85 + 0.01 * iteration, 1.0 - 0.2 * iteration)
        step(mean_batch(rows(6, seed=iteration)), rates)
        traced.append((step.num_traces, len(moves)))
    assert step.num_traces == traces
    assert moves
    assert len(set(traced)) == 1, "neither gradients nor the update are traced after the first iteration"


def test_the_rate_is_the_one_of_this_iteration() -> None:
    model = make_model()
    step = TrainStep(model, make_optimizer(model), micro_tokens=1000, dtype=mx.float32)
    batch = mean_batch(rows(2))
    step(batch, Rates(1.0, 0.9, 1.0))
    before = arrays(model)
    step(batch, Rates(0.0, 0.9, 1.0))
    for name, value in arrays(model).items():
        np.testing.assert_array_equal(value, before[name])
    step(batch, Rates(0.5, 0.9, 1.0))
    assert all((value != before[name]).any() for name, value in arrays(model).items())


# Precision


@pytest.mark.parametrize("micro_rows", [1, 100])
def test_bfloat16_computes_beside_float32_masters(path: str, micro_rows: int) -> None:
    exact, coarse = make_model(), make_model()
    batches = [mean_batch(rows(3, seed=seed)) for seed in range(2)]
    optimizer = make_optimizer(coarse)
    expected = train(exact, make_optimizer(exact), batches)
    got = train(coarse, optimizer, batches, micro_rows=micro_rows, dtype=mx.bfloat16)
    masters = flatten_parameters(coarse)
    assert {value.dtype for value in masters.values()} == {mx.float32}
    assert {value.dtype for value in optimizer.state.values()} == {mx.float32}
    # More digits than bfloat16 has, so they were never rounded to it.
    assert all((value != value.astype(mx.bfloat16).astype(mx.float32)).any().item() for value in masters.values())
    np.testing.assert_allclose(got, expected, rtol=0.05)  # eight bits of mantissa
    assert got != expected


def test_a_few_steps_learn_a_batch_by_heart() -> None:
    model, batch = make_model(), mean_batch(rows(2))
    results = train(model, make_optimizer(model), [batch] * 40)
    assert results[-1][0] < 0.2 * results[0][0]
