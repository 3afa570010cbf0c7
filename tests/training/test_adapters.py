"""A training of adapters: they alone move, have moments and are saved; the rest is what any training does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from kit.models import make_model
from kit.training import NumberedBatches, make_optimizer, make_rows, schedule
from mlxchat.errors import Interrupted
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters, trained_parameters
from mlxchat.model.lora import Adapters, attach_adapters
from mlxchat.model.sizes import AdapterSizes, count_adapter_parameters, matrices_of, resolve_targets
from mlxchat.optim.optimizer import AdamWRule, Optimizer, Rates
from mlxchat.rl.scores import PolicyScores
from mlxchat.runner.context import Context
from mlxchat.training.batches import Batch, mean_batch
from mlxchat.training.loop import fit
from mlxchat.training.step import TrainStep

RULE = AdamWRule(1e-2, (0.9, 0.999), 0.0)
KINDS = ["lora", "dora", "qlora"]
Make = Callable[..., tuple[GPT, Optimizer]]


def sizes_of(kind: str, model: GPT, targets: tuple[str, ...] = ("all",), dropout: float = 0.0) -> AdapterSizes:
    names = resolve_targets(targets, model.sizes)
    if kind == "qlora":
        return AdapterSizes("lora", 3, 2.0, names, bits=4, group_size=32, dropout=dropout)
    return AdapterSizes(kind, 3, 2.0, names, dropout=dropout)


@pytest.fixture
def make() -> Make:
    def made(
        kind: str = "lora", *, dropout: float = 0.0, zeros: bool = False, dtype: mx.Dtype = mx.float32
    ) -> tuple[GPT, Optimizer]:
        """Return a model with adapters none of whose numbers is zero, and what moves them."""
        model = make_model()
        attach_adapters(model, sizes_of(kind, model, dropout=dropout), seed=1, dtype=dtype)
        rng = np.random.default_rng(8)
        if not zeros:
            moved = {
                name: value + mx.array(rng.normal(0, 0.1, value.shape).astype(np.float32))
                for name, value in trained_parameters(model).items()
            }
            set_parameters(model, moved)
        return model, Optimizer(model, make_optimizer(make_model()).config, width=model.sizes.width, adapter=RULE)

    return made


def batch(rows: int = 5, seed: int = 0) -> Batch:
    return mean_batch(make_rows(rows, seed=seed))


def copies(parameters: dict[str, mx.array]) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in parameters.items()}


def train(
    model: GPT, optimizer: Optimizer, *, steps: int = 3, micro_tokens: int = 1000, recompute: bool = False
) -> list[tuple[float, float]]:
    step = TrainStep(model, optimizer, micro_tokens=micro_tokens, dtype=mx.float32, recompute=recompute)
    return [step(batch(seed=index), Rates(1.0, 0.9, 1.0), index) for index in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_move_and_nothing_else(make: Make, kind: str) -> None:
    model, optimizer = make(kind)
    before, moved = copies(flatten_parameters(model)), set(trained_parameters(model))
    train(model, optimizer, steps=1)
    changed = {name for name, value in copies(flatten_parameters(model)).items() if (value != before[name]).any()}
    assert changed == moved
    assert {name.rpartition(".")[2] for name in moved} == {"lora_a", "lora_b", *(["m"] if kind == "dora" else [])}


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_adapters_alone(make: Make, kind: str) -> None:
    model, optimizer = make(kind)
    trained = count_adapter_parameters(sizes_of(kind, model), model.sizes)
    assert sum(value.size for name, value in optimizer.state.items() if name != "count") == 2 * trained


def test_weight_decay_shrinks_adapters_and_not_the_lengths_of_doras_rows(make: Make) -> None:
    model, optimizer = make("dora")
    decaying = Optimizer(model, optimizer.config, width=model.sizes.width, adapter=RULE._replace(weight_decay=0.1))
    decays = {name.rpartition(".")[2]: rule.weight_decay for name, rule in decaying.adamw_rules.items()}
    assert decays == {"lora_a": 0.1, "lora_b": 0.1, "m": 0.0}


def test_one_step_is_adamws_first_step_whatever_the_rates_of_the_optimizer(make: Make) -> None:
    model, optimizer = make()
    before = copies(trained_parameters(model))
    train(model, optimizer, steps=1)
    for name, value in copies(trained_parameters(model)).items():
        # Adam's first step has the rate's length in every number with a gradient.
        np.testing.assert_allclose(np.abs(value - before[name]), RULE.lr, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_fused_matrices_by_the_chain_rule(make: Make, kind: str) -> None:
    model, optimizer = make(kind)
    sizes = sizes_of(kind, model)
    _, found = TrainStep(model, optimizer, micro_tokens=1000, dtype=mx.float32).gradients(batch())
    own, base = trained_parameters(model), flatten_parameters(make_model())
    whole = make_model()
    adapters = Adapters(sizes, copies(own))
    set_parameters(whole, {name: adapters.on(name, weight) for name, weight in base.items()})
    _, of_whole = TrainStep(whole, make_optimizer(whole), micro_tokens=1000, dtype=mx.float32).gradients(batch())
    rounded = Adapters(AdapterSizes("lora", 3, 2.0, (), sizes.bits, sizes.group_size), {})
    for module in sizes.targets:
        slope, a, b = (
            np.asarray(value)
            for value in (of_whole[f"{module}.weight"], *(own[f"{module}.{x}"] for x in ("lora_a", "lora_b")))
        )
        if kind == "dora":
            adapted_weight = np.asarray(rounded.on(f"{module}.weight", base[f"{module}.weight"])) + 2.0 * (a @ b).T
            lengths = np.linalg.norm(adapted_weight, axis=1, keepdims=True)
            d_m = (slope * adapted_weight / lengths).sum(1)
            np.testing.assert_allclose(np.asarray(found[f"{module}.m"]), d_m, rtol=2e-3, atol=2e-6)
            slope = slope * np.asarray(own[f"{module}.m"])[:, None] / lengths
        np.testing.assert_allclose(np.asarray(found[f"{module}.lora_a"]), 2.0 * (b @ slope).T, rtol=2e-3, atol=2e-6)
        np.testing.assert_allclose(np.asarray(found[f"{module}.lora_b"]), 2.0 * (slope @ a).T, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_both_code_paths_learn_the_same(make: Make, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    on_cpu = train(*make(kind))
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    np.testing.assert_allclose(train(*make(kind)), on_cpu, rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_path_in_bfloat16_has_the_gradients_of_float32_and_moves_float32(
    make: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _, exact = TrainStep(*make(kind), micro_tokens=1000, dtype=mx.float32).gradients(batch())
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    model, optimizer = make(kind, dtype=mx.bfloat16)
    step = TrainStep(model, optimizer, micro_tokens=1000, dtype=mx.bfloat16)
    _, found = step.gradients(batch())
    assert found.keys() == exact.keys()
    for name, value in found.items():
        difference = np.linalg.norm(np.asarray(value.astype(mx.float32)) - np.asarray(exact[name]))
        assert difference < 0.15 * np.linalg.norm(np.asarray(exact[name])), name
    step(batch(), Rates(1.0, 0.9, 1.0), 0)
    assert {value.dtype for value in trained_parameters(model).values()} == {mx.float32}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_rounding_alone(make: Make, kind: str, dropout: float) -> None:
    whole = train(*make(kind, dropout=dropout))
    np.testing.assert_allclose(train(*make(kind, dropout=dropout), micro_tokens=32), whole, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_give_the_same_bits(make: Make, kind: str) -> None:
    model, optimizer = make(kind, dropout=0.2)
    kept = train(model, optimizer)
    again, other = make(kind, dropout=0.2)
    assert train(again, other, recompute=True) == kept
    for name, value in copies(trained_parameters(model)).items():
        assert np.array_equal(value, np.array(trained_parameters(again)[name])), name


def test_dropout_changes_what_is_learnt_and_nothing_that_is_evaluated(make: Make) -> None:
    (with_it, optimizer), (without, other) = make(dropout=0.5), make()
    ids = mx.array(batch().ids)
    assert mx.array_equal(with_it(ids), without(ids)).item()
    assert train(with_it, optimizer) != train(without, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_is_stopped_goes_on_to_the_same_bits_and_saves_adapters_alone(
    make: Make, make_context: Callable[..., Context], kind: str
) -> None:
    linear = schedule(warmdown_frac=0.5, shape="linear", weight_decay_frac=0.0)

    def go(name: str, **context: Any) -> GPT:
        model, optimizer = make(kind, dropout=0.1)
        ctx = make_context(name, **context)
        fit(ctx, model, optimizer, NumberedBatches(), num_iterations=6, schedule=linear, hooks=[], micro_tokens=64)
        return model

    asked = iter([None, None, None, 15, *[15] * 99])
    with pytest.raises(Interrupted):
        go("stopped", stop_signal=lambda: next(asked))
    (saved,) = Path(make_context("stopped").work).rglob("arrays.safetensors")
    names = {name.split(".", 1)[1] for name in load_file(saved) if name.startswith("model.")}
    model = go("stopped")
    assert names == set(trained_parameters(model))
    straight, resumed = copies(flatten_parameters(go("straight"))), copies(flatten_parameters(model))
    assert [name for name, value in resumed.items() if not np.array_equal(value, straight[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_were_not_trained_are_the_base_which_rl_takes_for_its_reference(make: Make, kind: str) -> None:
    model, optimizer = make(kind, zeros=True)
    rows = batch()
    reference = trained_parameters(model)
    scores = PolicyScores(model, micro_tokens=1000, dtype=mx.float32)
    at_first, _ = scores(rows.ids, rows.targets)
    train(model, optimizer)
    now, _ = scores(rows.ids, rows.targets)
    then, _ = scores(rows.ids, rows.targets, reference)
    assert np.array_equal(then, at_first)
    assert not np.allclose(now, then, atol=1e-3)
    assert sum(value.nbytes for value in reference.values()) < sum(v.nbytes for v in flatten_parameters(model).values())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_new_adapters_change_no_bit(make: Make, kind: str) -> None:
    ids = mx.array(batch().ids)
    assert mx.array_equal(make(kind, zeros=True)[0](ids), make_model()(ids)).item()


def test_a_is_uniform_within_the_root_of_its_rows_and_b_is_zero(make: Make) -> None:
    model, _ = make(zeros=True)
    shapes = matrices_of(model.sizes)
    for name, value in trained_parameters(model).items():
        module, _, which = name.rpartition(".")
        if which == "lora_b":
            assert not np.asarray(value).any()
            continue
        bound = shapes[module][1] ** -0.5
        numbers = np.asarray(value)
        assert np.abs(numbers).max() <= bound
        assert numbers.std() == pytest.approx(bound / 3**0.5, rel=0.25)
    assert len({np.asarray(value).tobytes() for name, value in trained_parameters(model).items() if "_a" in name}) > 5


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("attention",), 8), (("mlp",), 4), (("all",), 12), (("c_q", "c_v"), 4), (("c_proj",), 4),
     (("mlp.c_proj",), 2), (("h.1.attn.c_k",), 1), (("transformer.h.0.mlp.c_fc", "mlp"), 4)],
)  # fmt: skip
def test_targets_are_groups_or_ends_of_names(targets: tuple[str, ...], count: int) -> None:
    assert len(resolve_targets(targets, make_model().sizes)) == count
