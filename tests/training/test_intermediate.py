"""When a training publishes intermediate models, and that each can be extended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.models import make_model
from kit.training import NumberedBatches, make_optimizer, schedule
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import Interrupted
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT, flatten_parameters
from mlxchat.runner.context import Context
from mlxchat.training.best import Best
from mlxchat.training.loop import Hook, derived_after, fit

Weights = dict[str, bytes]
Train = Callable[..., tuple[Weights, dict[int, Path]]]


def bits(model: GPT) -> Weights:
    return {name: np.array(value).tobytes() for name, value in flatten_parameters(model).items()}


@pytest.fixture
def train(make_context: Callable[..., Context], tokenizer: Tokenizer, tmp_path: Path) -> Train:
    def run(
        name: str, *, every: int | None = 3, stop_after: int = 99, extends: Path | None = None, best: bool = False,
        stop_in_hook: int = 99,
    ) -> tuple[Weights, dict[int, Path]]:  # fmt: skip
        """Train ten iterations, or up to a stop; return the last weights and the intermediate models."""
        model, batches, published = make_model(), NumberedBatches(), dict[int, Path]()
        ctx = make_context(name, lambda: 15 if batches.number >= stop_after else None)

        def publish(iteration: int, write: Callable[[Path], None], derived: Mapping[str, Any]) -> str:
            published[iteration] = tmp_path / f"{name}@{iteration}"
            published[iteration].mkdir(exist_ok=True)
            write(published[iteration])
            return name

        def validate(iteration: int) -> dict[str, float]:
            if iteration == stop_in_hook:
                raise Interrupted("stopped while validating", 15)
            return {"val_bpb": float(iteration)}

        ctx.publisher = publish
        fit(
            ctx, model, make_optimizer(model), batches, num_iterations=10, schedule=schedule(), keep_state=True,
            hooks=[Hook(run=validate, every=1)], save_every=every, extends=extends, micro_tokens=64,
            best=Best(every=1, basis=1) if best else None,
            save=lambda folder: save_checkpoint(folder, model, tokenizer, {}),
        )  # fmt: skip
        return bits(model), published

    return run


def test_models_are_published_at_their_cadence_but_not_at_the_end(train: Train) -> None:
    assert list(train("run")[1]) == [3, 6, 9]
    assert list(train("another", every=5)[1]) == [5]
    assert train("none", every=None)[1] == {}


def test_an_intermediate_model_has_the_present_weights_and_the_end_the_best_ones(train: Train) -> None:
    """Validation only rises: the first weights are the best."""
    end, published = train("best", best=True)
    first = train("first", every=1)[1]
    assert bits(load_checkpoint(published[6])[0]) == bits(load_checkpoint(first[6])[0])
    assert end == bits(load_checkpoint(first[1])[0])


@pytest.mark.parametrize("best", [False, True])
def test_an_extension_of_an_intermediate_model_ends_as_the_training_did(train: Train, best: bool) -> None:
    straight, published = train("straight", best=best)
    (published[6] / "metrics.jsonl").write_text(json.dumps({"iteration": 6}) + "\n")
    extended, further = train("extended", extends=published[6])
    assert list(further) == [9]
    assert extended == train("last", every=None)[0]
    assert (extended == straight) is not best


@pytest.mark.parametrize("stop", [{"stop_after": 6}, {"stop_in_hook": 6}, {"stop_after": 7}])
def test_a_stop_at_the_iteration_of_a_model_leaves_none_out(train: Train, stop: dict[str, int]) -> None:
    straight, whole = train("straight")
    with pytest.raises(Interrupted):
        train("stopped", **stop)
    end, after = train("stopped")
    assert end == straight
    assert set(after) <= set(whole)
    names = {path.name.removeprefix("stopped@") for path in whole[3].parent.glob("stopped@*")}
    assert names == {"3", "6", "9"}


def test_counts_of_a_training_follow_its_iterations() -> None:
    whole = {"num_iterations": 40, "total_tokens": 81_920, "total_flops": 4e12, "width": 64}
    assert derived_after(10, 40, whole) == {
        "num_iterations": 10,
        "total_tokens": 20_480,
        "total_flops": 1e12,
        "width": 64,
    }
    assert derived_after(6, 12, {"num_iterations": 3, "num_updates": 12}) == {"num_iterations": 1, "num_updates": 6}
