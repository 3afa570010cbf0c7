"""`mlxchat import nanochat`, and import:NAME wherever a model may be named."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxchat.cli import dispatch
from mlxchat.composition.compose import compose_config
from mlxchat.errors import ConfigError, DataError
from mlxchat.pipeline import plan_of
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

Twin, Lay = Any, Any
RL = ("pipeline=imported_rl", "stage=rl", "machine=cpu", "rl.num_iterations=1")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the test's own folder, where outputs/ is."""
    monkeypatch.chdir(tmp_path)


def take(*words: str) -> Path:
    assert dispatch(["import", "nanochat", *words]) == 0
    (place,) = Path("outputs/store").glob("imported-*")
    return place


def plan(*settings: str) -> dict[str, PlannedStep]:
    config = compose_config(list(settings)).config
    return {step.name: step for step in plan_of(config, Store(Path(config.outputs)))}


def wired(name: str) -> tuple[str, ...]:
    """Return a pipeline of RL alone, from an import."""
    return (*RL, "~pipeline.imported", "~pipeline.eval_imported", f"pipeline.rl.checkpoint=import:{name}")


def test_import_is_made_once_and_may_have_several_names(twin, capfd):
    made = twin("org/some-model")
    place = take(str(made.folder))
    assert place.name.startswith("imported-some_model-")
    manifest = read_manifest(place)
    assert (manifest["kind"], manifest["stage"]) == ("checkpoint", "imported")
    assert {Path(each["url"]).name for each in manifest["externals"]} == {
        "model_000007.pt", "meta_000007.json", "tokenizer.pkl",
    }  # fmt: skip
    assert all(len(each["sha256"]) == 64 for each in manifest["externals"])
    assert take(str(made.folder), "--name", "again") == place
    store = Store(Path("outputs"))
    assert resolve(store, "import:some-model") == resolve(store, "import:again") == place
    assert "import:again is imported-some_model-" in capfd.readouterr().out


def test_rl_key_does_not_depend_on_the_reference(twin):
    made = twin("model")
    take(str(made.folder), "--name", "d2")
    from_name, from_stage = plan(*wired("d2")), plan(*RL, f"imported.folder={made.folder}")
    assert from_stage["imported"].state == "done"
    assert from_name["rl"].key == from_stage["rl"].key
    assert set(from_name) == {"rl"}
    assert from_name["rl"].title == "rl-d2"


def test_import_name_can_be_replaced_and_removed(twin):
    first, second = twin("first", seed=1), twin("second", seed=2)
    take(str(first.folder), "--name", "x")
    before = resolve(Store(Path("outputs")), "import:x")
    with pytest.raises(ConfigError, match=r"import:x is another model.*--forget x"):
        dispatch(["import", "nanochat", str(second.folder), "--name", "x"])
    assert dispatch(["import", "--forget", "x"]) == 0
    dispatch(["import", "nanochat", str(second.folder), "--name", "x"])
    assert resolve(Store(Path("outputs")), "import:x") != before
    assert dispatch(["import", "--forget", "x"]) == 0
    with pytest.raises(ConfigError, match='there is no import "x"'):
        dispatch(["import", "--forget", "x"])


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["hf"], ConfigError, "expected mlxchat import FORMAT WHAT"),
        (["nanochat", "./nothing"], DataError, "nothing does not exist"),
        (["nanochat", "d32"], ConfigError, "neither a folder nor a repository of the Hub"),
        (["nanochat", ".", "--name", "a/b"], ConfigError, '"a/b" is not an import name'),
        (["./a_folder"], ConfigError, "expected mlxchat import nanochat.hf.adapter, got"),
    ],
)
def test_wrong_arguments_are_refused(words, error, message):
    with pytest.raises(error, match=message):
        dispatch(["import", *words])


def test_rl_chat_and_evaluation_accept_an_import(twin, say, tmp_path, tiny):
    take(str(twin().folder), "--name", "x")
    wiring = (
        "pipeline=imported_rl", "~pipeline.imported", "pipeline.rl.checkpoint=import:x",
        "pipeline.eval_imported.checkpoint=import:x",
    )  # fmt: skip
    say(*tiny, *wiring)
    made = resolve(Store(tmp_path / "outputs"), "rl")
    assert json.loads((made / "checkpoint.json").read_text())["imported"]["step"] == 7
    scored = json.loads((resolve(Store(tmp_path / "outputs"), "eval_imported") / "manifest.json").read_text())
    assert scored["inputs"]["checkpoint"]["step"] == "imported"
    assert "checkpoint: imported-x-" in say("lineage", "rl")
    say("chat", "import:x", "-p", "hello", "--max-tokens", "2")
    say("verify", "import:x")


def test_key_of_an_import_is_stable(twin):
    steps = plan(*RL, f"imported.folder={twin('golden', random=False).folder}")
    assert steps["imported"].key == "mdymr4hx2qihgryagyec3jce7jz3mykuepkliun45rwkzyorovha"
