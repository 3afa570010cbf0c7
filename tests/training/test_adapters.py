"""A training of adapters: they alone move, have moments and are saved."""

import math

import mlx.core as mx
import numpy as np
import pytest

from kit.models import arrays_of, make_model
from kit.training import bits, make_optimizer, make_rows
from mlxchat.config.schema import AdapterConfig
from mlxchat.data.packing import Batch, mean_batch
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import attach_adapters
from mlxchat.model.parameters import set_parameters, trained_parameters
from mlxchat.model.sizes import resolve_targets, shapes_of
from mlxchat.optim.optimizer import AdamWRule, Optimizer, Rates
from mlxchat.rl.rollouts import PolicyScores
from mlxchat.training.step import TrainStep

RULE = AdamWRule(1e-2, (0.9, 0.999), 0.0)
RATES = Rates(1.0, 0.9, 1.0)
KINDS = ["lora", "dora", "qlora"]


def sizes_of(kind: str, model: GPT, dropout: float = 0.0) -> AdapterConfig:
    names = resolve_targets(("all",), model.sizes)
    if kind == "qlora":
        return AdapterConfig(kind="lora", rank=3, targets=names, bits=4, group_size=32, dropout=dropout)
    return AdapterConfig(kind=kind, rank=3, targets=names, dropout=dropout)


def make(
    kind: str = "lora", *, dropout: float = 0.0, zeros: bool = False, dtype: mx.Dtype = mx.float32
) -> tuple[GPT, Optimizer]:
    """Return a model with adapters and their optimizer; the adapters are new, or have no zeros."""
    model = make_model()
    attach_adapters(model, sizes_of(kind, model, dropout), seed=1, dtype=dtype)
    rng = np.random.default_rng(8)
    if not zeros:
        moved = {
            name: value + mx.array(rng.normal(0, 0.1, value.shape).astype(np.float32))
            for name, value in trained_parameters(model).items()
        }
        set_parameters(model, moved)
    return model, Optimizer(model, make_optimizer(make_model()).config, width=model.sizes.width, adapter=RULE)


def batch(rows: int = 5, seed: int = 0) -> Batch:
    return mean_batch(make_rows(rows, seed=seed))


def learn(
    model: GPT, optimizer: Optimizer, *, steps: int = 2, micro_tokens: int = 1000, recompute: bool = False
) -> list[tuple[float, float]]:
    step = TrainStep(model, optimizer, micro_tokens=micro_tokens, dtype=mx.float32, recompute=recompute)
    return [step(batch(seed=index), RATES, index) for index in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_move_and_have_moments(kind):
    """The first step of Adam has the length of the rate in every number with a gradient."""
    model, optimizer = make(kind)
    before, adapters = arrays_of(model), set(trained_parameters(model))
    assert {name.rpartition(".")[2] for name in adapters} == {"lora_a", "lora_b", *(["m"] if kind == "dora" else [])}
    count = sum(map(math.prod, shapes_of(sizes_of(kind, model), model.sizes).values()))
    assert sum(value.size for name, value in optimizer.state.items() if name != "count") == 2 * count
    learn(model, optimizer, steps=1)
    for name, value in arrays_of(model).items():
        np.testing.assert_allclose(np.abs(value - before[name]), RULE.lr if name in adapters else 0, rtol=1e-2)


@pytest.mark.parametrize("kind", ["dora", "qlora"])
def test_both_code_paths_learn_the_same(monkeypatch, kind):
    """In bfloat16 nearly so, with float32 adapters."""
    on_cpu = learn(*make(kind))
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    np.testing.assert_allclose(learn(*make(kind)), on_cpu, rtol=2e-4)
    model, optimizer = make(kind, dtype=mx.bfloat16)
    loss, norm = TrainStep(model, optimizer, micro_tokens=1000, dtype=mx.bfloat16)(batch(), RATES, 0)
    assert (loss, norm) == pytest.approx(on_cpu[0], rel=0.05)
    assert {value.dtype for value in trained_parameters(model).values()} == {mx.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_rounding_and_recomputing_no_bit(kind):
    model, optimizer = make(kind, dropout=0.3)
    whole = learn(model, optimizer)
    np.testing.assert_allclose(learn(*make(kind, dropout=0.3), micro_tokens=32), whole, rtol=1e-5)
    recomputed, other = make(kind, dropout=0.3)
    assert learn(recomputed, other, recompute=True) == whole
    assert bits(recomputed) == bits(model)


@pytest.mark.parametrize("kind", ["dora", "qlora"])
def test_untrained_adapters_serve_as_reference_for_rl(kind):
    model, optimizer = make(kind, zeros=True)
    rows = batch()
    reference = trained_parameters(model)
    scores = PolicyScores(model, micro_tokens=1000, dtype=mx.float32)
    at_first, _ = scores(rows.ids, rows.targets)
    learn(model, optimizer)
    now, _ = scores(rows.ids, rows.targets)
    then, _ = scores(rows.ids, rows.targets, reference)
    assert np.array_equal(then, at_first)
    assert not np.allclose(now, then, atol=1e-3)
