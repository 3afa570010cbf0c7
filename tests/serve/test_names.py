"""Names of models: every verb and the server resolve them in the same way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kit.commands import Command
from mlxchat.serve.models import Models
from mlxchat.serve.security import Fault
from mlxchat.store.manifest import read_manifest, write_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store
from serve.servers import BASE, CHAT

QUICKSTART = "20260101-000000-000001-1-quickstart"
VERBS = {
    "chat": ("chat", "NAME", "-p", "hello", "--max-tokens", "1"), "serve": ("serve", "NAME", "--port", "0"),
    "show": ("show", "NAME"), "export --to mlx": ("export", "NAME", "--to", "mlx", "PLACE"),
}  # fmt: skip


@pytest.fixture
def store(served: Path, tmp_path: Path) -> Store:
    """One run with a base model and a chat model, which also has a pin and the name of an import."""
    shutil.copytree(served, tmp_path / "outputs", symlinks=True)
    found = Store(tmp_path / "outputs")
    shutil.rmtree(found.outputs / "refs" / "latest")
    found.prepare()
    chat = read_manifest(found.outputs / "store" / CHAT)
    write_manifest(found.outputs / "store" / CHAT, chat | {"metrics": {"val_loss": 0.5}})
    named = (
        (QUICKSTART, "pretrain", BASE),
        (QUICKSTART, "sft", CHAT),
        ("pins", "best", CHAT),
        ("imports", "mine", CHAT),
    )
    for group, name, folder in named:
        found.set_ref(group, name, found.outputs / "store" / folder)
    return found


@pytest.fixture
def say(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlxchat.serve.api.run_server", lambda *arguments, **options: 0)

    def run(words: tuple[str, ...], name: str) -> tuple[int, str]:
        named = {"NAME": name, "PLACE": str(tmp_path / "place")}
        return command(*(named.get(word, word) for word in words), "outputs=outputs")

    return run


@pytest.mark.parametrize("name", [f"{QUICKSTART}/sft", f"outputs/store/{CHAT}", "import:mine"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_accepts_names_of_runs_paths_and_imports(verb, name, say):
    code, said = say(VERBS[verb], name)
    assert CHAT in said
    assert code == 0, said


@pytest.mark.parametrize("verb", VERBS)
def test_unknown_names_give_one_message(verb, say):
    assert say(VERBS[verb], "sftt") == (2, (
        'error: "sftt" is no artifact or run in outputs. Steps of the latest run: pretrain, sft. '
        'Runs: quickstart. Pins: best. Imports: mine. Did you mean "sft"?\n'
    ))  # fmt: skip


def test_server_resolves_names_as_verbs_do(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = Models(store, resolve(store, "quickstart/pretrain"))
    assert [models.find(name).name for name in (None, "sft", "quickstart/sft")] == [BASE, CHAT, CHAT]
    for name in ("sftt", "../outputs", "../../etc/passwd", "/etc/passwd", "a/../../b", "a\0b", "x" * 10_000, "~/x"):
        with pytest.raises(Fault, match="does not exist") as caught:
            models.find(name)
        assert caught.value.status == 404
        assert str(store.outputs) not in str(caught.value)


def test_prompts_of_a_model_are_those_of_its_evaluation(store):
    asked = [{"prompt": f"Where is {place}?", "text": "Here."} for place in ("the mill", "the pub", "the mill")]
    evaluation = next((store.outputs / "store").glob("eval-*"))
    for folder in (evaluation, store.outputs / "store" / BASE):
        (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    entries = Models(store, resolve(store, "quickstart/sft")).entries()
    prompts = {entry["id"]: entry["mlxchat"]["prompts"] for entry in entries}
    assert prompts == {name: ["Where is the mill?", "Where is the pub?"] for name in (CHAT, BASE)}
