"""The loop: records, cadences, and that an interrupted training ends with the same bits."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from kit import training
from kit.models import composed, computing_on_cpu, make_model, make_tokenizer
from kit.text import core_items, write_bundle
from kit.training import NumberedBatches, Trained, bits, make_context, make_optimizer, schedule
from mlxchat.config.schema import CoreConfig, PretrainConfig, TaskItem
from mlxchat.errors import DataError, Interrupted, StepFailed
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.runner.context import Context
from mlxchat.training.loop import derived_after
from mlxchat.training.monitor import Monitor, Observation, observe_core, observe_suite
from mlxchat.training.state import Checkpointer, load_moments

OPTIONS: dict[str, Any] = {"rates": schedule(warmup_frac=0.2, warmdown_frac=0.5), "dropout": 0.2}
MEASURED = {"tokens_per_second", "data_wait_frac", "elapsed_seconds", "peak_memory_bytes"}


VALIDATION = Observation(run=lambda iteration: {"val_loss": float(iteration)}, every=(1,), at_start=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training of six iterations without interruptions."""
    with computing_on_cpu():
        return training.train(tmp_path_factory.mktemp("straight"), observations=[VALIDATION], **OPTIONS)


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.bits == expected.bits
    one, other = (
        [{key: value for key, value in record.items() if key not in MEASURED} for record in records(each)]
        for each in (found, expected)
    )
    assert one == other


def records(done: Trained) -> list[dict[str, Any]]:
    return done.ctx.records("metrics").read()


# Records and hooks


def test_each_iteration_is_recorded(straight):
    found = [record for record in records(straight) if "loss" in record]
    assert [record["iteration"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert [record["lr_multiplier"] for record in found] == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])
    for record in found:
        assert {"loss", "grad_norm"} | MEASURED <= set(record)
        assert record["tokens_per_second"] > 0
        assert 0 < record["loss"] < 20
    losses, weights = [record["loss"] for record in found], 0.9 ** np.arange(5, -1, -1)
    metrics = straight.ctx.metrics
    assert metrics["loss"] == pytest.approx(float(weights @ losses / weights.sum())), "debiased exponential mean"
    assert metrics["tokens_per_second"] > 0
    assert metrics["val_loss"] == 6.0


def test_observations_and_records_follow_their_cadences(train, straight):
    """An observation whose two cadences coincide is called once."""
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [6]),
        ({"every": (2,)}, [2, 4, 6]),
        ({"every": (4, None), "at_start": True}, [0, 4, 6]),
        ({"at_start": True}, [0, 6]),
        ({"every": (2, 3)}, [2, 3, 4, 6]),
        ({"every": (4, 4), "at_end": False}, [4]),
    ]
    called: list[list[int]] = [[] for _ in cases]

    def observation(number: int) -> Observation:
        def note(iteration: int) -> dict[str, float]:
            called[number].append(iteration)
            return {f"number_{number}": float(iteration)}

        return Observation(run=note, **cases[number][0])

    done = train(observations=[observation(number) for number in range(len(cases))])
    assert called == [expected for _, expected in cases]
    assert [list(done.curve(f"number_{number}")) for number in range(len(cases))] == called
    assert list(done.curve("loss")) == [1, 2, 3, 4, 5, 6]
    assert done.curve("loss")[4] != straight.curve("loss")[4], "it has no dropout"


def test_saves_take_two_percent_of_the_time(tmp_path, monkeypatch):
    """Each iteration takes 1 s and each save 4 s of a fake clock."""
    clock, saved = [0.0], []
    monkeypatch.setattr("mlxchat.training.state.time.monotonic", lambda: clock[0])

    def write(self, iteration, state):
        clock[0] += 4
        saved.append(iteration)

    monkeypatch.setattr(Checkpointer, "_save", write)
    monkeypatch.setattr(Checkpointer, "_state", lambda self: {})
    step: Any = SimpleNamespace(model=None, optimizer=None)
    for every, expected in ((30.0, [30, 230, 430]), (300.0, [300, 600]), (0.0, list(range(1, 601)))):
        saved.clear()
        checkpointer = Checkpointer(make_context(tmp_path, checkpoint_seconds=every), step, None, None)
        for iteration in range(1, 601):
            clock[0] += 1
            checkpointer.save_if_due(iteration)
        assert saved == expected


# Interruption


def test_interrupted_training_ends_with_the_same_bits(train, straight):
    options = OPTIONS | {"observations": [VALIDATION]}
    for stop in (1, 2, 5):
        with pytest.raises(Interrupted, match=f"iteration {stop} of 6") as caught:
            train(stop_after=stop, **options)
        assert caught.value.exit_code == 128 + 15
    done = train(stop_after=6, **options)  # a signal during the last iteration lets it end
    assert done.ctx.resumed_from == 5
    assert_same(done, straight)


# A fixed time


def test_training_ends_after_max_seconds_with_the_whole_schedule(train, monkeypatch):
    """Iterations take half a second by this clock, as does what is between them, which does not count.

    The first of each start does not, either: 1 + 4 iterations fill two seconds, or 2 + 4 with one interruption.
    """
    ticks = count()
    monkeypatch.setattr(Monitor, "_clocks", lambda self: (0.5 * next(ticks), 0.0, 0.0))
    options: dict[str, Any] = {"num_iterations": 100, "max_seconds": 2.0, "rates": schedule(warmdown_frac=1.0)}
    done = train("timed", observations=[VALIDATION], **options)
    assert done.curve("lr_multiplier") == pytest.approx({1: 1, 2: 1, 3: 0.75, 4: 0.5, 5: 0.25}, abs=0.02)
    assert done.ctx.metrics["val_loss"] == 5, "the end is observed"
    with pytest.raises(Interrupted, match="iteration 3 of 6"):
        train("interrupted", stop_after=3, **options)
    assert max(train("interrupted", **options).curve("loss")) == 6, "what was spent before counts"
    assert max(train("short", **options | {"num_iterations": 3}).curve("loss")) == 3, "the first limit ends it"


# Losses and gradients that are NaN or infinite

SKIP = {"on_nan": "skip"}


@pytest.fixture
def train_with(train: Callable[..., Trained]) -> Callable[..., Trained]:
    def run(name: str, broken: set[int], **settings: Any) -> Trained:
        """Train six iterations with NaN in some batches; settings are those of `training`."""
        context, batches = {"training": settings}, NumberedBatches(broken=broken)
        return train(name, batches=batches, context=context, observations=[VALIDATION], **OPTIONS)

    return run


def test_nan_stops_and_the_same_command_continues_before_it(train_with, straight, tmp_path):
    with pytest.raises(StepFailed) as caught:
        train_with("run", {3})
    message = str(caught.value)
    for part in ("iteration 4 of 6 gave loss nan and gradient norm nan", "book 3, page 7", "training.on_nan=skip",
                 f"after iteration 3 of 6 is saved in {tmp_path / 'run' / 'work'}"):  # fmt: skip
        assert part in message
    assert caught.value.exit_code == 1
    done = train_with("run", set())
    assert done.ctx.resumed_from == 3
    assert done.bits == straight.bits


def test_skipped_updates_are_counted_and_recorded(train_with, straight, capsys):
    """Bits do not depend on a stop before the first: on_nan is no part of the identity."""
    done = train_with("run", {2, 4}, **SKIP)
    found = [record for record in records(done) if "lr_multiplier" in record]
    assert (done.ctx.metrics["skipped_iterations"], "skipped_iterations" in straight.ctx.metrics) == (2, False)
    assert [record["iteration"] for record in found if "loss" not in record] == [3, 5]
    assert done.curve("skipped_iterations") == {3: 1, 5: 2}
    assert "book 2, page 7" in found[2]["warning"]
    assert np.isfinite(done.ctx.metrics["loss"])
    json.dumps(found, allow_nan=False)  # other readers than Python's refuse NaN
    assert "iteration 3: loss nan" in capsys.readouterr().err
    with pytest.raises(StepFailed):
        train_with("stopped", {2, 4})
    assert train_with("stopped", {2, 4}, **SKIP).bits == done.bits


# An extended training ends as if it had been longer from the start; warm starts take over the moments

STATE = "training_state.safetensors"


@pytest.fixture(scope="module")
def never_extended(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Eight iterations at a constant rate."""
    with computing_on_cpu():
        return training.train(tmp_path_factory.mktemp("straight"), 8, keep_state=True)


def test_extensions_equal_one_training_bit_for_bit(never_extended, train):
    """An extension can be interrupted and extended; its records begin with those of what it extends."""
    short = train("short", 2, keep_state=True)
    longer = train("longer", 4, extends=short.ctx.out, keep_state=True)
    assert longer.ctx.resumed_from is None, "nothing of its own was interrupted"
    with pytest.raises(Interrupted, match="iteration 6 of 8"):
        train("longest", 8, extends=longer.ctx.out, stop_after=6)
    longest = train("longest", 8, extends=longer.ctx.out)
    assert longest.ctx.resumed_from == 6
    assert longest.bits == never_extended.bits
    assert longest.curve("loss") == never_extended.curve("loss")


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


# Intermediate models, and trainings that end at a target, through stops and for an extension

# val_bpb after each iteration. Every second one is compared with the target.
NUMBERS = [9.0, 5.0, 7.0, 3.0, 1.0, 3.0, 4.0, 6.0, 5.0, 8.0]
Weights = dict[str, bytes]


class Trained(NamedTuple):
    """A training: its weights at the end and after each iteration, and its intermediate models."""

    ctx: Context
    weights: Weights
    seen: dict[int, Weights]
    published: dict[int, Path]


def train(
    folder: Path, num_iterations: int = 10, *, target: float = 0.0, stop_in_hook: int = 99, **options: Any
) -> Trained:
    """Train to the end, to a target or to a stop."""
    model, seen, published = make_model(), dict[int, Weights](), dict[int, Path]()

    def publish(iteration: int, write: Callable[[Path], None], derived: Mapping[str, Any]) -> str:
        published[iteration] = folder / f"model@{iteration}"
        published[iteration].mkdir(exist_ok=True)
        write(published[iteration])
        (published[iteration] / "metrics.jsonl").write_text(json.dumps({"iteration": iteration}) + "\n")
        return "model"

    def validate(iteration: int) -> dict[str, float]:
        if iteration == stop_in_hook:
            raise Interrupted("stopped while validating", 15)
        seen[iteration] = bits(model)
        return {"val_bpb": NUMBERS[iteration - 1], "val_perplexity": 10 * NUMBERS[iteration - 1]}

    def observe(ctx: Context, model: GPT) -> list[Observation]:
        ctx.publish = publish
        return [Observation(run=validate, every=(1,))]

    done = training.train(
        folder, num_iterations, model=model, observations=observe, keep_state=True,
        is_enough=lambda done, numbers: done % 2 == 0 and numbers["val_bpb"] <= target,
        save=lambda folder: save_checkpoint(folder, model, make_tokenizer(), {}), **options,
    )  # fmt: skip
    return Trained(done.ctx, bits(model), seen, published)


@pytest.fixture(scope="module")
def published_run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training with intermediate models."""
    with computing_on_cpu():
        return train(tmp_path_factory.mktemp("straight"), save_every=3)


# A target


def test_training_ends_where_it_reaches_the_target(tmp_path):
    """Observations see that it ends, and a stop changes nothing."""

    def to_target(name: str, target: float, **options: Any) -> Trained:
        return train(tmp_path / name, target=target, **options)

    straight = to_target("straight", 3.0)
    assert (max(straight.seen), straight.ctx.metrics["val_bpb"]) == (4, 3.0)
    assert max(to_target("never", 0.5).seen) == 10
    for stop in ({"stop_after": 1}, {"stop_after": 3}, {"stop_in_hook": 4}):
        with pytest.raises(Interrupted):
            to_target("stopped", 3.0, **stop)
    assert to_target("stopped", 3.0).weights == straight.weights


# Intermediate models


def test_intermediate_models_have_the_present_weights_and_can_be_extended(published_run, tmp_path):
    assert list(published_run.published) == [3, 6, 9]
    assert list(train(tmp_path / "other", save_every=5).published) == [5], "the end is no intermediate model"
    for iteration, folder in published_run.published.items():
        assert bits(load_checkpoint(folder)[0]) == published_run.seen[iteration]
    extended = train(tmp_path / "extended", extends=published_run.published[6], save_every=3)
    assert (list(extended.published), extended.weights) == ([9], published_run.weights)


def test_counts_of_a_training_follow_its_iterations():
    whole = {"num_iterations": 40, "total_tokens": 81_920, "total_flops": 4e12, "width": 64}
    assert derived_after(10, 40, whole) == {**whole, "num_iterations": 10, "total_tokens": 20_480, "total_flops": 1e12}
    assert derived_after(6, 12, {"num_iterations": 3, "num_updates": 12}) == {"num_iterations": 1, "num_updates": 6}


# Evaluations during training: their numbers, that they affect no bits, and that an interrupted one resumes

SUITE = {"letters": TaskItem(task="kinds_mc", split="test", stop=8), "sums": TaskItem(task="arithmetic", size=3)}


@pytest.fixture
def pretrain(tmp_path: Path) -> PretrainConfig:
    """A pretraining that estimates CORE every second iteration, of a bundle with two small tasks."""
    kind = "multiple_choice"
    tasks = {label: (kind, 0, 50, core_items(kind, count)) for label, count in (("one", 12), ("two", 13))}
    folder = write_bundle(tmp_path / "bundle", tasks)
    return replace(composed().pretrain, core=CoreConfig(bundle=str(folder)), core_every=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The training without hooks."""
    with computing_on_cpu():
        return training.train(tmp_path_factory.mktemp("plain"), 4)


def test_core_estimates_change_no_byte_and_continue_after_a_stop(train, plain, pretrain, tokenizer, tmp_path):
    """The stop comes after the first batch of the estimate at iteration 2, before the training has saved anything."""

    def hooks(ctx: Context, model: GPT) -> list[Observation]:
        return observe_core(ctx, pretrain, model, tokenizer)

    def stop() -> int | None:
        return 15 if (tmp_path / "stopped" / "work" / "core" / "2" / "one.jsonl").exists() else None

    straight = train("straight", 4, observations=hooks)
    assert straight.bits == plain.bits
    estimates = straight.curve("core_estimate")
    assert estimates.keys() == {2, 4}
    assert straight.ctx.metrics["core_estimate"] == estimates[4]
    with pytest.raises(Interrupted, match="CORE's task 1 of 2"):
        train("stopped", 4, observations=hooks, context={"stop_signal": stop})
    resumed = train("stopped", 4, observations=hooks)
    assert (resumed.bits, resumed.curve("core_estimate")) == (plain.bits, estimates)
    assert resumed.ctx.resumed_from == 2


def test_suite_changes_no_byte(train, plain, tokenizer, monkeypatch):
    monkeypatch.setattr("mlxchat.training.monitor.SUITE_ANSWER_TOKENS", 4)
    sft = replace(composed().sft, suite=SUITE, suite_every=2)
    done = train("with", 4, observations=lambda ctx, model: observe_suite(ctx, sft, model, tokenizer))
    assert done.bits == plain.bits
    accuracies, metrics = done.curve("accuracy_letters"), done.ctx.metrics
    assert accuracies.keys() == {2, 4}
    centered = (accuracies[4] - 0.25) / 0.75
    assert metrics["mean_centered_choice"] == pytest.approx(centered, abs=1e-12)
    assert metrics["mean_centered"] == pytest.approx((centered + metrics["accuracy_sums"]) / 2, abs=1e-12)
