"""Intermediate models of a training: contents, names, and no effect on the training."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from kit.artifacts import find_faults
from kit.toys import ONE, ToySection
from mlxchat.errors import DataError, StoreError
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import find, find_model, latest, links, resolve
from mlxchat.store.store import Store

# Publishes after two and four of six iterations; a file called fail-N makes it fail after the Nth.
TRAINING = """
    import pathlib
    done = len(list(ctx.work.glob("done-*")))
    ctx.rewind_records(done)
    while done < 6:
        done += 1
        ctx.log({"iteration": done, "val": 1 / done})
        ctx.metrics["val"] = 1 / done
        if done % 2 == 0 and done < 6 and ctx.config.toy.cadence:
            write = lambda folder: [(folder / name).write_text(str(done)) for name in ("result.txt", "more.txt")]
            ctx.publish(done, write, {"num_iterations": done})
        ctx.work.mkdir(exist_ok=True)
        (ctx.work / f"done-{done}").touch()
        if pathlib.Path(f"fail-{done}").exists():
            pathlib.Path(f"fail-{done}").unlink()
            raise DataError("stopped")
    for name in ("result.txt", "more.txt"):
        (ctx.out / name).write_text("6")
"""


@dataclass
class Extending(ToySection):
    """Settings of a training that can extend another one."""

    extend: str | None = field(default=None, metadata={"identity": False, "artifact": "extends"})


@pytest.fixture
def training(toys: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    toys.add("make", TRAINING, produces="checkpoint", outputs=("result.txt", "more.txt"))
    monkeypatch.chdir(tmp_path)
    return toys


def fail_after(training: Any, iteration: int, folder: Any) -> None:
    """Run until it fails after so many iterations."""
    (folder / f"fail-{iteration}").touch()
    with pytest.raises(DataError):
        training.run(training.plan(ONE))


def test_intermediate_models_are_artifacts_with_provenance(training):
    training.run(training.plan(ONE))
    store: Store = training.store
    place = resolve(store, "one@4")
    manifest, final = read_manifest(place), read_manifest(resolve(store, "one"))
    assert (place / "result.txt").read_text() == "4"
    assert find_faults(store, place) == []
    assert manifest["config"] == {**final["config"], "iteration": 4}
    assert (manifest["step"], manifest["kind"], manifest["inputs"]) == ("one@4", "checkpoint", final["inputs"])
    assert (manifest["metrics"], manifest["derived"]) == ({"val": 0.25}, {"num_iterations": 4})


def test_publishing_changes_no_key_and_no_plan(training):
    training.config.toy.cadence = 0
    training.run(training.plan(ONE))
    (without,) = training.plan(ONE)
    training.config.toy.cadence = 1
    training.run(training.plan(ONE, force=["one"]))
    (with_models,) = training.plan(ONE)
    assert (with_models.key, with_models.rid, with_models.state) == (without.key, without.rid, "done")
    assert sorted(links(training.store, "run2")) == ["one", "one@2", "one@4"]
    training.config.toy.number = 2
    assert training.plan(ONE)[0].reason == "config changed: toy.number 1 → 2"


def test_resumed_training_publishes_each_model_once(training, tmp_path):
    fail_after(training, 3, tmp_path)
    assert sorted(links(training.store, "run1")) == ["one@2"]
    training.run(training.plan(ONE))
    training.run(training.plan(ONE))
    assert sorted(links(training.store, "run2")) == ["one", "one@4"]
    saved = [resolve(training.store, f"run3/one@{n}") for n in (2, 4)]
    assert [(place / "result.txt").read_text() for place in saved] == ["2", "4"]
    assert [path.name[:5] for path in sorted((training.outputs / "records").iterdir())] == ["make-", "make@", "make@"]
    assert list((training.outputs / "work").iterdir()) == []


def test_running_training_names_its_last_model(training, tmp_path):
    fail_after(training, 5, tmp_path)
    store = training.store
    names = ("one", "run1/one", "run1", "one@4", "run1/one@4")
    assert {find(store, name).place for name in names} == {resolve(store, "one@4")}
    assert (find_model(store, "one").run, latest(store)) == ("run1", "run1")
    assert find_model(store, None).place == resolve(store, "one@4")
    training.run(training.plan(ONE))
    assert {find(training.store, name).place.joinpath("result.txt").read_text() for name in names[:1]} == {"6"}
    with pytest.raises(StoreError, match=r'run1 has no "two", only one@2, one@4'):
        find(store, "run1/two")


def test_an_extension_that_was_stopped_continues_and_does_not_extend_its_own_models(training, tmp_path):
    fail_after(training, 3, tmp_path)
    extended = resolve(training.store, "one")
    training.config.toy = Extending(number=2, extend="one")
    fail_after(training, 5, tmp_path)
    assert resolve(training.store, "one").name != extended.name, "the extension has published models of this name"
    (step,) = training.plan(ONE)
    assert (step.artifacts["extends"]["name"], step.reason) == (extended.name, f"extends {extended.name}, resumes")
    training.run(training.plan(ONE))
    assert training.plan(ONE)[0].done
