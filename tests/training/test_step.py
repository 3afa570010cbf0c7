"""One iteration: micro-batches and lanes do not matter, every target counts once, master weights stay float32."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import arrays_of, make_model
from kit.training import NumberedBatches, bits, make_optimizer, make_rows, schedule
from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import TeacherConfig
from mlxchat.data.packing import IGNORED, Batch, mean_batch
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import ConfigError, Interrupted
from mlxchat.model import forward
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.forward import Dropping, draw_keys, dropped, dropping
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.ops.loss import token_scores
from mlxchat.optim.optimizer import Flat, Rates
from mlxchat.planning.inputs import check_inputs
from mlxchat.planning.memory import check_memory
from mlxchat.runner.plan import make_plan
from mlxchat.store.store import Store
from mlxchat.training.finetune import load_teacher
from mlxchat.training.step import Distillation, TrainStep

ROW_TOKENS = 16
RATES = Rates(1.0, 0.9, 1.0)


def make_batch(count: int, *, seed: int = 0, targets_per_row: list[int] | None = None) -> Batch:
    """Return random rows; with targets_per_row only the first targets of each row count."""
    kept = (targets_per_row or [ROW_TOKENS] * count)[:count]
    rows = zip(make_rows(count, seed=seed), kept, strict=True)
    return mean_batch([(ids, np.where(np.arange(ROW_TOKENS) < n, targets, IGNORED)) for (ids, targets), n in rows])


def make_step(model: GPT, *, micro_rows: int = 100, dtype: mx.Dtype = mx.float32, **optimizer: object) -> TrainStep:
    return TrainStep(model, make_optimizer(model, **optimizer), micro_tokens=micro_rows * ROW_TOKENS, dtype=dtype)


def losses_of(model: GPT, batch: Batch) -> np.ndarray:
    hidden = model.hidden(mx.array(batch.ids)).reshape(-1, model.sizes.width)
    return np.asarray(token_scores(hidden, model.lm_head.weight, mx.array(batch.targets.reshape(-1)), ["losses"])[0])


# Loss and gradients


def assert_slopes(model: GPT, gradients: Flat, loss: Callable[[], float]) -> None:
    """Compare gradients with central differences of the loss along a random direction of each parameter.

    Each direction includes the gradient's, so that the slope is not lost in rounding: differences of 0.01 in float32
    are good for about one percent.
    """
    start, rng = flatten_parameters(model), np.random.default_rng(0)
    for name, value in start.items():
        gradient, direction = np.asarray(gradients[name]), rng.normal(size=value.shape).astype(np.float32)
        direction = direction / np.linalg.norm(direction) + gradient / np.linalg.norm(gradient)
        ends = []
        for sign in (1, -1):
            set_parameters(model, {name: value + sign * 1e-2 * mx.array(direction)})
            ends.append(loss())
        set_parameters(model, {name: value})
        assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2), name


@pytest.mark.parametrize("micro_rows", [1, 2, 100])
def test_loss_is_the_mean_over_all_targets_of_the_batch(micro_rows):
    """nanochat's mean of the micro-batches' means would be another number."""
    model, batch = make_model(), make_batch(4, targets_per_row=[16, 1, 3, 0])
    losses = losses_of(model, batch)
    loss, _ = make_step(model, micro_rows=micro_rows)(batch, RATES)
    assert loss == pytest.approx(losses.sum() / 20, rel=1e-5)
    assert abs(loss - np.mean([losses[:16].mean(), losses[16:17].mean(), losses[32:35].mean()])) > 1e-3


def test_gradients_are_the_slopes_of_the_loss(path):
    """The norm is before clipping."""
    model, batch = make_model(), make_batch(3)
    step = make_step(model, grad_clip=0.01)
    _, gradients = step.gradients(batch)
    assert_slopes(model, gradients, lambda: losses_of(model, batch).astype(np.float64).mean())
    norm = np.sqrt(sum((np.asarray(value, dtype=np.float64) ** 2).sum() for value in gradients.values()))
    assert step(batch, RATES)[1] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.1


@pytest.mark.parametrize(("micro_rows", "value"), [(1, np.nan), (3, np.inf), (4, -np.inf)])
def test_non_finite_step_changes_neither_weights_nor_moments(micro_rows, value):
    model, batches = make_model(), NumberedBatches(rows=4, broken={1}, value=value)
    step = make_step(model, micro_rows=micro_rows)
    step(batches.next_batch(0), RATES)
    before = bits(model, step.optimizer)
    assert not np.isfinite(step(batches.next_batch(1), RATES)).all()
    assert bits(model, step.optimizer) == before
    assert np.isfinite(step(batches.next_batch(2), RATES)).all()
    assert bits(model, step.optimizer) != before


# Micro-batches and lanes


@pytest.mark.parametrize("micro_rows", [0, 1, 4])
def test_accumulation_equals_the_whole_batch(micro_rows):
    """Also where the last micro-batch is smaller, and where not even a row fits."""
    batches = [make_batch(6, seed=seed, targets_per_row=[16, 2, 9, 0, 16, 5]) for seed in range(2)]
    whole, parts, start = make_model(), make_model(), arrays_of(make_model())
    one, other = make_step(whole), make_step(parts, micro_rows=micro_rows)
    # Other sums of the same float32 numbers; Adam's root and Muon's iteration amplify the rounding.
    np.testing.assert_allclose(
        [other(each, RATES) for each in batches], [one(each, RATES) for each in batches], rtol=1e-4
    )
    for name, value in arrays_of(whole).items():
        moved = np.linalg.norm(value - start[name])
        assert np.linalg.norm(arrays_of(parts)[name] - value) < 2e-3 * moved, name


@pytest.mark.parametrize(
    ("num_lanes", "micro_rows", "variant", "num_rows"),
    [(2, 4, "oct2025", 7), (3, 100, "jul2026", 7), (3, 4, "jul2026", 7), (3, 100, "oct2025", 2)],
)
def test_several_lanes_equal_one(set_lanes, num_lanes, micro_rows, variant, num_rows):
    """Seven rows give the lanes unequal parts; with micro-batches of four the last one has other parts."""
    batches = [make_batch(num_rows, seed=seed, targets_per_row=[16, 2, 9, 0, 16, 5, 1]) for seed in range(2)]
    results = []
    for count in (1, num_lanes, num_lanes):
        set_lanes(count)
        model = make_model()
        step = make_step(model, micro_rows=micro_rows, variant=variant)
        results.append(([step(each, RATES) for each in batches], arrays_of(model)))
    (expected, one), (got, other), (again, same) = results
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for name, value in one.items():
        assert np.linalg.norm(other[name] - value) < 1e-5 * np.linalg.norm(value), name
        np.testing.assert_array_equal(same[name], other[name])
    assert again == got, "the same lanes give the same bits"


@pytest.mark.parametrize(("num_lanes", "micro_rows", "traces"), [(1, 100, 1), (1, 4, 2), (2, 4, 4), (3, 2, 2)])
def test_new_rates_and_data_compile_nothing_again(set_lanes, num_lanes, micro_rows, traces):
    """One trace per shape and lane: six rows by four leave a micro-batch of two; one of two rows takes two lanes."""
    set_lanes(num_lanes)
    step = make_step(make_model(), micro_rows=micro_rows)
    for iteration in range(3):
        rates = Rates(1.0 - 0.1 * iteration, 0.85 + 0.01 * iteration, 1.0 - 0.2 * iteration)
        step(make_batch(6, seed=iteration), rates)
    assert step.num_traces == traces


# Precision


@pytest.mark.parametrize("micro_rows", [1, 100])
def test_bfloat16_computes_beside_float32_masters(path, micro_rows):
    model, batches = make_model(), [make_batch(3, seed=seed) for seed in range(2)]
    step = make_step(model, micro_rows=micro_rows, dtype=mx.bfloat16)
    exact = make_step(make_model())
    expected, got = ([each(batch, RATES) for batch in batches] for each in (exact, step))
    masters = flatten_parameters(model)
    assert {value.dtype for value in (masters | step.optimizer.state).values()} == {mx.float32}
    # More digits than bfloat16 has, so they were never rounded to it.
    assert all((value != value.astype(mx.bfloat16).astype(mx.float32)).any().item() for value in masters.values())
    np.testing.assert_allclose(got, expected, rtol=0.05)  # eight bits of mantissa
    assert got != expected


@pytest.mark.parametrize(("architecture", "dtype"), [("oct2025", mx.float32), ("jul2026", mx.bfloat16)], ids=str)
def test_recomputing_gives_the_same_bits_with_less_memory(set_lanes, architecture, dtype):
    """In float32 the peak was measured at 41 % of the other, on one lane: several run ahead of each other by chance."""
    set_lanes(1)
    outcomes, peaks = [], []
    for recompute in (False, True):
        model = make_model(architecture, num_layers=6, num_heads=2, context_tokens=128, seed=1, scale=0.1)
        step = TrainStep(model, make_optimizer(model), micro_tokens=4096, dtype=dtype, recompute=recompute)
        batch = mean_batch(make_rows(8, tokens=128))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        numbers = [step(batch, RATES) for _ in range(2)]
        peaks.append(mx.get_peak_memory() - before)
        assert np.isfinite(numbers).all()
        outcomes.append((numbers, bits(model)))
    assert outcomes[0] == outcomes[1]
    assert dtype != mx.float32 or peaks[1] < 0.5 * peaks[0]


# Dropout: statistics of its masks, what they depend on, and where it acts

DROPOUT_ROW_TOKENS, RATE, SEED = 16, 0.2, 9


@pytest.fixture
def batch() -> Batch:
    return mean_batch(make_rows(6, seed=3))


def make_dropping_step(model: GPT, *, micro_rows: int = 6, **options: Any) -> TrainStep:
    return TrainStep(
        model, make_optimizer(model), micro_tokens=micro_rows * DROPOUT_ROW_TOKENS, dtype=mx.float32,
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
    step = make_dropping_step(model, micro_rows=micro_rows)
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


# Learning from a teacher's distributions: which teachers fit, what is learnt, and that it resumes

TEACHER_RATES = Rates(1.0, 0.0, 0.9)
TEACHER = TeacherConfig(path=None, artifact=None, weight=0.5, temperature=1.0)


def make_teacher(vocab_size: int = 280, **sizes: Any) -> GPT:
    other = {"num_layers": 3, "num_heads": 2, "width": 24, "seed": 11, "scale": 0.4}
    return make_model(**{**other, "vocab_size": vocab_size, **sizes})


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "teacher"
    path.mkdir()
    save_checkpoint(path, make_teacher(), tokenizer, {"format": "chat"})
    return path


def load(folder: Path, tokenizer: Tokenizer, **changes: Any) -> Distillation:
    return load_teacher(replace(TEACHER, **changes), folder, tokenizer, row_tokens=16, dtype=mx.float32)


def make_taught_step(student: GPT, distillation: Distillation | None, *, micro_tokens: int = 64) -> TrainStep:
    return TrainStep(
        student, make_optimizer(student), micro_tokens=micro_tokens, dtype=mx.float32, distillation=distillation
    )


def batch_of(seed: int, rows: int = 4) -> Any:
    ids = np.random.default_rng(seed).integers(0, 280, (rows, 17)).astype(np.int32)
    return mean_batch([(row[:-1], np.where(np.arange(16) % 3 == 0, -1, row[1:]).astype(np.int32)) for row in ids])


def expected_parts(student: GPT, teacher: GPT, batch: Any) -> tuple[float, float]:
    """Return the mean cross-entropy and the mean divergence over what is trained on, in float64."""

    def log_softmax(model: GPT) -> np.ndarray[Any, Any]:
        logits = np.asarray(model(mx.array(batch.ids)), dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    q, p = log_softmax(student), log_softmax(teacher)
    trained = batch.targets >= 0
    ce = -np.take_along_axis(q, np.maximum(batch.targets, 0)[..., None], -1)[..., 0][trained].mean()
    return float(ce), float((np.exp(p) * (p - q)).sum(-1)[trained].mean())


@pytest.mark.parametrize("micro_tokens", [16, 64])
def test_step_reports_cross_entropy_and_divergence_at_targets(micro_tokens, folder, tokenizer):
    student, batch = make_model(), batch_of(0)
    ce, kl = expected_parts(student, make_teacher(), batch)
    step = make_taught_step(student, load(folder, tokenizer, weight=0.25), micro_tokens=micro_tokens)
    loss, norm = step(batch, TEACHER_RATES)
    assert step.loss_parts == pytest.approx({"ce": ce, "kl": kl}, rel=1e-5)
    assert loss == pytest.approx(0.75 * ce + 0.25 * kl, rel=1e-5)
    assert norm > 0
    alone = make_taught_step(make_model(), None)
    alone(batch, TEACHER_RATES)
    assert alone.loss_parts == {}


def test_interrupted_distillation_ends_with_the_same_bits(folder, tokenizer, train):
    options = {"distillation": load(folder, tokenizer), "rates": schedule(warmdown_frac=0.5)}
    whole = train("whole", 5, **options)
    with pytest.raises(Interrupted):
        train("cut", 5, stop_after=3, **options)
    resumed = train("cut", 5, **options)
    assert (resumed.bits, resumed.ctx.resumed_from) == (whole.bits, 3)
    curves = [resumed.curve(name) for name in ("loss", "ce", "kl")]
    assert curves == [whole.curve(name) for name in ("loss", "ce", "kl")]
    assert resumed.ctx.metrics["kl"] == whole.ctx.metrics["kl"]
    for loss, ce, kl in zip(*(curve.values() for curve in curves), strict=True):
        assert loss == pytest.approx(0.5 * ce + 0.5 * kl, rel=1e-5)


def test_unsuitable_teachers_are_refused_before_anything_runs(folder, tmp_path):
    settings = ["model.depth=2", f"sft.teacher.path={folder}", "machine=cpu", "machine.memory_limit_bytes=20000000"]
    config, store = compose_config([*settings, f"outputs={tmp_path}"]).config, Store(tmp_path)
    plan = make_plan(replace(config, targets=["sft"]), store)
    config.sft.teacher.path = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"sft\.teacher: .*missing holds no model"):
        check_inputs(config, plan)
    config.sft.teacher.path = str(folder)
    with pytest.raises(ConfigError, match=r"sft needs about .*; no sft\.teacher; "):
        check_memory(config, plan)
