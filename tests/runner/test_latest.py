"""The latest run is one run: the last one that finished a model."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.errors import DataError, Interrupted, StoreError
from mlxchat.store.naming import called, describe_model, find, find_model, latest, refs_of
from mlxchat.store.store import Store
from mlxchat.sweep.job import _name_again

BASE = {"corpus": {"stage": "make"}, "pretrain": {"stage": "pretrain", "source": "corpus"}}
WHOLE = {**BASE, "sft": {"stage": "sft", "source": "pretrain"}, "eval": {"stage": "copy", "source": "corpus"}}


@pytest.fixture
def models(toys: Any) -> Any:
    """Stages that make models: of `pretrain` the number is toy.number, of `sft` other.number."""
    body = "(ctx.out / 'result.txt').write_text(str(ctx.config.{}.number))"
    toys.add("pretrain", body.format("toy"), inputs={"source": "thing"}, produces="checkpoint")
    toys.add("sft", body.format("other"), inputs={"source": "checkpoint"}, config=("other",), produces="checkpoint")
    return toys


def chosen(models: Any) -> tuple[str, str]:
    """Return the step and the run of the model that is used where none is named."""
    found = find_model(models.store, None)
    return found.place.name.split("-")[0], str(found.run)


def test_latest_is_the_last_run_that_finished_a_model_and_only_that(models: Any) -> None:
    """After a run with RL, a run that only pretrained was latest, and chat answered with the first run's RL model."""
    models.run(models.plan(WHOLE))
    assert (chosen(models), set(refs_of(models.store))) == (("sft", "run1"), set(WHOLE))
    models.config.toy.number = 2
    models.run(models.plan(BASE))
    assert (chosen(models), set(refs_of(models.store))) == (("pretrain", "run2"), set(BASE))
    assert find(models.store, "sft").run == "run1", "a step that the latest run lacks is of the last run that has it"


def test_a_run_without_a_model_leaves_latest_as_it_is(models: Any) -> None:
    models.run(models.plan(WHOLE))
    models.config.toy.number = 2
    models.run(models.plan({"corpus": BASE["corpus"]}))
    assert chosen(models) == ("sft", "run1")


def test_without_any_model_the_steps_of_the_last_run_are_known(models: Any) -> None:
    run = models.run(models.plan({"corpus": BASE["corpus"]}))
    assert find(models.store, "corpus").run == run.name
    with pytest.raises(StoreError, match="holds no model yet"):
        find_model(models.store, None)


def test_a_run_that_only_reused_models_is_latest_once_it_is_complete(models: Any) -> None:
    models.run(models.plan(WHOLE))
    models.config.toy.number = 2
    models.run(models.plan(BASE))
    models.config.toy.number = 1
    models.run(models.plan(WHOLE))
    assert chosen(models) == ("sft", "run3")


def test_a_run_that_failed_before_its_first_own_model_is_not_latest(models: Any) -> None:
    models.run(models.plan(WHOLE))
    models.add("sft", "raise DataError('no')", inputs={"source": "checkpoint"}, produces="checkpoint", version=2)
    with pytest.raises(DataError):
        models.run(models.plan(WHOLE))
    assert chosen(models) == ("sft", "run1")


def test_a_stopped_run_is_latest_with_the_model_that_it_finished(models: Any) -> None:
    handler = signal.getsignal(signal.SIGINT)
    models.run(models.plan(WHOLE))
    models.config.toy.number = 2
    models.add(
        "pretrain", "(ctx.out / 'result.txt').touch(); os.kill(os.getpid(), signal.SIGINT)",
        inputs={"source": "thing"}, produces="checkpoint",
    )  # fmt: skip
    with pytest.raises(Interrupted):
        models.run(models.plan(WHOLE))
    assert signal.getsignal(signal.SIGINT) is handler
    assert chosen(models) == ("pretrain", "run2")


def test_a_run_of_a_verb_is_latest_only_where_nothing_else_is(models: Any, tmp_path: Path) -> None:
    """An import was the latest run, and chat, status and report said there was nothing."""
    models.run(models.plan(WHOLE))
    models.config.toy.number = 2
    models.run(models.plan(BASE), becomes_latest=False)
    assert chosen(models) == ("sft", "run1")
    # The same without another run.
    name = "20260101-000000-000001-1-import"
    shutil.rmtree(models.outputs / "refs" / "run1")
    (models.outputs / "refs" / "latest").unlink()
    (models.outputs / "refs" / "run2").rename(models.outputs / "refs" / name)
    assert chosen(models) == ("pretrain", name)


def repeated(models: Any, pipeline: dict[str, dict[str, str]]) -> None:
    """Do what a command does whose steps are all done."""
    name = "20990101-000000-000001-1-again"
    _name_again(compose_config(["name=again"]), models.plan(pipeline), models.store, name)


def test_a_command_with_nothing_to_do_makes_its_run_the_latest_one(models: Any) -> None:
    models.run(models.plan(WHOLE))
    models.config.toy.number = 2
    models.run(models.plan(BASE))
    models.config.toy.number = 1
    repeated(models, WHOLE)
    assert chosen(models) == ("sft", "run1")


def test_an_artifact_whose_run_was_killed_before_it_was_named_gets_a_name(models: Any) -> None:
    """It was there, and no run: not shown as a step, and cleaned away."""
    models.run(models.plan({"corpus": BASE["corpus"]}))
    shutil.rmtree(models.outputs / "refs")
    (models.outputs / "refs").mkdir()
    repeated(models, {"corpus": BASE["corpus"]})
    assert called(str(find(models.store, "corpus").run)) == "again"
    assert not (models.outputs / "refs" / "latest").is_symlink()


def test_a_command_with_nothing_to_do_is_a_run_where_its_steps_are_of_several(models: Any) -> None:
    models.run(models.plan(WHOLE))
    models.run(models.plan({**BASE, "other": {"stage": "copy", "source": "corpus"}}))
    repeated(models, {**WHOLE, "other": {"stage": "copy", "source": "corpus"}})
    assert latest(models.store) == "20990101-000000-000001-1-again"
    assert set(refs_of(models.store)) == {*WHOLE, "other"}
    assert json.loads((models.outputs / "runs" / latest(models.store) / "plan.json").read_text())["steps"]


def test_latest_moves_with_the_outputs_folder_and_outlives_its_link(models: Any, tmp_path: Path) -> None:
    models.run(models.plan(WHOLE))
    moved = models.outputs.rename(tmp_path / "moved")
    assert latest(Store(moved)) == "run1"
    (moved / "refs" / "latest").unlink()
    assert latest(Store(moved)) == "run1"


def test_a_folder_of_mixed_steps_from_before_gives_way_to_the_last_run(models: Any) -> None:
    models.run(models.plan(WHOLE))
    models.config.toy.number = 2
    models.run(models.plan(BASE))
    link = models.outputs / "refs" / "latest"
    link.unlink()
    for step, run in (("pretrain", "run2"), ("sft", "run1")):
        models.store.set_ref("latest", step, refs_of(models.store, run)[step])
    assert chosen(models) == ("pretrain", "run2")
    models.config.toy.number = 3
    models.run(models.plan(BASE))
    assert link.is_symlink()
    assert chosen(models) == ("pretrain", "run3")


def test_a_model_is_described_with_step_run_artifact_and_time(models: Any) -> None:
    models.run(models.plan(WHOLE))
    found = find_model(models.store, None)
    published = json.loads((found.place / "manifest.json").read_text())["published"][:16].replace("T", " ")
    assert describe_model(models.store, found) == f"sft of run run1 ({found.place.name}, {published})"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("20261122-103100-000001-4242-quickstart", "quickstart"), ("20261122-103100-7-a-b-1", "a-b-1"),
        ("20261122-103100-000001-4242-4-layers", "4-layers"), ("imported-20261122-103100", "imported-20261122-103100"),
        ("mine", "mine"),
    ],
)  # fmt: skip
def test_a_run_is_called_what_follows_its_number(folder: str, name: str) -> None:
    assert called(folder) == name
