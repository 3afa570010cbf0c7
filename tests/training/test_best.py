"""Candidates and intermediate models: which weights are kept and published, through stops and for an extension."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from kit import training
from kit.models import computing_on_cpu, make_model, make_tokenizer
from kit.training import bits
from mlxchat.errors import Interrupted
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.runner.context import Context
from mlxchat.training.loop import Observation, derived_after
from mlxchat.training.state import Candidates

# val_bpb after each iteration. Every second one is a candidate: the lowest of these is 3.0, at the fourth and sixth.
NUMBERS = [9.0, 5.0, 7.0, 3.0, 1.0, 3.0, 4.0, 6.0, 5.0, 8.0]
Weights = dict[str, bytes]


@dataclass
class Trained:
    ctx: Context
    weights: Weights
    seen: dict[int, Weights]
    """The weights after each iteration."""
    published: dict[int, Path]
    """The intermediate models."""


def train(
    folder: Path, num_iterations: int = 10, *, keep: bool = True, target: Any = None, stop_in_hook: int = 99,
    **options: Any,
) -> Trained:  # fmt: skip
    """Train to the end, to a target or to a stop, with every second of the numbers as a candidate."""
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
        ctx.publisher = publish
        return [Observation(run=validate, every=(1,))]

    done = training.train(
        folder, num_iterations, model=model, observations=observe, keep_state=True,
        candidates=Candidates(every=2, keep=keep, target=target),
        save=lambda folder: save_checkpoint(folder, model, make_tokenizer(), {}), **options,
    )  # fmt: skip
    return Trained(done.ctx, bits(model), seen, published)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training with intermediate models, which ends with the weights of its fourth iteration."""
    with computing_on_cpu():
        return train(tmp_path_factory.mktemp("straight"), save_every=3)


# The best weights


def test_model_ends_with_the_weights_of_the_best_candidate(straight):
    assert straight.weights == straight.seen[4] != straight.seen[10]
    assert bits(load_checkpoint(straight.ctx.out)[0]) == straight.seen[4]
    metrics = straight.ctx.metrics
    assert (metrics["best_iteration"], metrics["val_bpb"], metrics["val_perplexity"]) == (4, 3.0, 30.0)
    assert (metrics["last_val_bpb"], metrics["last_val_perplexity"]) == (8.0, 80.0)


@pytest.mark.parametrize(
    ("every", "numbers", "choose", "expected"),
    [
        (7, [5.0] * 9 + [1.0], min, 10),  # the last is always a candidate
        (2, [math.nan, math.inf] * 5, min, None),
        (2, NUMBERS, min, 4),  # the first of equals
        (2, NUMBERS, max, 10),
    ],
)
def test_best_is_the_first_candidate_with_the_best_finite_number(every, numbers, choose, expected):
    model, best = make_model(), Candidates(every=every, metric="reward", choose=choose)
    best.offer(0, {"reward": choose(-99.0, 99.0)}, model)
    for iteration, number in enumerate(numbers, 1):
        best.offer(iteration, {"reward": number}, model, is_last=iteration == len(numbers))
    assert best.iteration == expected


def test_interrupted_training_keeps_the_same_weights(straight, tmp_path):
    """Saves hold the best weights only where they are not the present ones."""
    for stop, is_present in ((4, True), (5, False), (9, False)):
        with pytest.raises(Interrupted):
            train(tmp_path, stop_after=stop)
        (saved,) = tmp_path.rglob("arrays.safetensors")
        assert any(name.startswith("best.") for name in load_file(saved)) is not is_present
    resumed = train(tmp_path)
    assert (resumed.weights, resumed.seen[10]) == (straight.weights, straight.seen[10])
    kept = ("best_iteration", "val_bpb", "last_val_bpb", "loss")
    assert [resumed.ctx.metrics[key] for key in kept] == [straight.ctx.metrics[key] for key in kept]


def test_extension_continues_from_the_last_weights(straight, tmp_path):
    """The best is one of its own candidates: 6.0 at 8 and 8.0 at 10."""
    short = train(tmp_path / "short", 6)
    assert short.weights == short.seen[4]
    extended = train(tmp_path / "extended", extends=short.ctx.out)
    assert (extended.seen[10], extended.weights) == (straight.seen[10], straight.seen[8])


# A target


def test_training_ends_at_the_first_candidate_that_reaches_the_target(tmp_path):
    """Observations see that it ends, and a stop changes nothing."""

    def to_target(name: str, target: float, **options: Any) -> Trained:
        return train(tmp_path / name, keep=False, target=target, **options)

    straight = to_target("straight", 3.0)
    assert (max(straight.seen), straight.ctx.metrics["val_bpb"]) == (4, 3.0)
    assert max(to_target("never", 0.5).seen) == 10
    for stop in ({"stop_after": 1}, {"stop_after": 3}, {"stop_in_hook": 4}):
        with pytest.raises(Interrupted):
            to_target("stopped", 3.0, **stop)
    assert to_target("stopped", 3.0).weights == straight.weights


# Intermediate models


def test_intermediate_models_have_the_present_weights_and_can_be_extended(straight, tmp_path):
    """An extension of one starts without best weights: of its own candidates the one at 8 is the best."""
    assert list(straight.published) == [3, 6, 9]
    assert list(train(tmp_path / "other", save_every=5).published) == [5], "the end is no intermediate model"
    for iteration, folder in straight.published.items():
        assert bits(load_checkpoint(folder)[0]) == straight.seen[iteration]
    extended = train(tmp_path / "extended", extends=straight.published[6], save_every=3)
    assert (list(extended.published), extended.seen[10]) == ([9], straight.seen[10])
    assert extended.weights == straight.seen[8]


def test_counts_of_a_training_follow_its_iterations():
    whole = {"num_iterations": 40, "total_tokens": 81_920, "total_flops": 4e12, "width": 64}
    assert derived_after(10, 40, whole) == {**whole, "num_iterations": 10, "total_tokens": 20_480, "total_flops": 1e12}
    assert derived_after(6, 12, {"num_iterations": 3, "num_updates": 12}) == {"num_iterations": 1, "num_updates": 6}
