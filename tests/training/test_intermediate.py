"""When a training publishes intermediate models, and that each can be extended."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kit import training
from kit.models import computing_on_cpu, make_model, make_tokenizer
from kit.training import bits
from mlxchat.errors import Interrupted
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.runner.context import Context
from mlxchat.training.best import Best
from mlxchat.training.loop import Hook, derived_after

Weights = dict[str, bytes]


def train(
    folder: Path, *, every: int | None = 3, best: bool = False, stop_in_hook: int = 99, **options: Any
) -> tuple[Weights, dict[int, Path]]:
    """Train ten iterations, or up to a stop; return the last weights and the intermediate models."""
    model, published = make_model(), dict[int, Path]()

    def publish(iteration: int, write: Callable[[Path], None], derived: Mapping[str, Any]) -> str:
        published[iteration] = folder / f"model@{iteration}"
        published[iteration].mkdir(exist_ok=True)
        write(published[iteration])
        return "model"

    def validate(iteration: int) -> dict[str, float]:
        if iteration == stop_in_hook:
            raise Interrupted("stopped while validating", 15)
        return {"val_bpb": float(iteration)}

    def hooks(ctx: Context, model: GPT) -> list[Hook]:
        ctx.publisher = publish
        return [Hook(run=validate, every=1)]

    training.train(
        folder, 10, model=model, hooks=hooks, keep_state=True, save_every=every,
        best=Best(every=1, basis=1) if best else None,
        save=lambda folder: save_checkpoint(folder, model, make_tokenizer(), {}), **options,
    )  # fmt: skip
    return bits(model), published


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, dict[int, Path]]:
    with computing_on_cpu():
        return train(tmp_path_factory.mktemp("straight"))


def test_models_are_published_at_their_cadence_but_not_at_the_end(straight, tmp_path):
    assert list(straight[1]) == [3, 6, 9]
    assert list(train(tmp_path, every=5)[1]) == [5]


def test_extended_intermediate_model_ends_as_the_training_did(straight, tmp_path):
    end, published = straight
    (published[6] / "metrics.jsonl").write_text(json.dumps({"iteration": 6}) + "\n")
    extended, further = train(tmp_path, extends=published[6])
    assert list(further) == [9]
    assert extended == end


def test_intermediate_models_have_the_present_weights_and_the_end_the_best(straight, tmp_path):
    """Validation only rises: the first weights are the best."""
    end, published = train(tmp_path, best=True, every=1)
    model = {iteration: bits(load_checkpoint(published[iteration])[0]) for iteration in (1, 6)}
    assert model[6] == bits(load_checkpoint(straight[1][6])[0])
    assert end == model[1]
    (published[6] / "metrics.jsonl").write_text(json.dumps({"iteration": 6}) + "\n")
    assert train(tmp_path / "extended", extends=published[6])[0] == straight[0]


@pytest.mark.parametrize("stop", [{"stop_after": 6}, {"stop_in_hook": 6}, {"stop_after": 7}], ids=str)
def test_stop_at_the_iteration_of_a_model_omits_none(straight, tmp_path, stop):
    with pytest.raises(Interrupted):
        train(tmp_path, **stop)
    end, after = train(tmp_path)
    assert end == straight[0]
    assert set(after) <= {3, 6, 9}
    assert {path.name for path in tmp_path.glob("model@*")} == {"model@3", "model@6", "model@9"}


def test_counts_of_a_training_follow_its_iterations():
    whole = {"num_iterations": 40, "total_tokens": 81_920, "total_flops": 4e12, "width": 64}
    quarter = {"num_iterations": 10, "total_tokens": 20_480, "total_flops": 1e12, "width": 64}
    assert derived_after(10, 40, whole) == quarter
    assert derived_after(6, 12, {"num_iterations": 3, "num_updates": 12}) == {"num_iterations": 1, "num_updates": 6}
