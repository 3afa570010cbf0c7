"""Intermediate models, and trainings that end at a target, through stops and for an extension."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kit import training
from kit.models import computing_on_cpu, make_model, make_tokenizer
from kit.training import bits
from mlxchat.errors import Interrupted
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.runner.context import Context
from mlxchat.training.loop import derived_after
from mlxchat.training.monitor import Observation

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
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
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


def test_intermediate_models_have_the_present_weights_and_can_be_extended(straight, tmp_path):
    assert list(straight.published) == [3, 6, 9]
    assert list(train(tmp_path / "other", save_every=5).published) == [5], "the end is no intermediate model"
    for iteration, folder in straight.published.items():
        assert bits(load_checkpoint(folder)[0]) == straight.seen[iteration]
    extended = train(tmp_path / "extended", extends=straight.published[6], save_every=3)
    assert (list(extended.published), extended.weights) == ([9], straight.weights)


def test_counts_of_a_training_follow_its_iterations():
    whole = {"num_iterations": 40, "total_tokens": 81_920, "total_flops": 4e12, "width": 64}
    assert derived_after(10, 40, whole) == {**whole, "num_iterations": 10, "total_tokens": 20_480, "total_flops": 1e12}
    assert derived_after(6, 12, {"num_iterations": 3, "num_updates": 12}) == {"num_iterations": 1, "num_updates": 6}
