"""`mlxchat plan`."""

import json

import pytest

from kit.commands import run_here


def test_plan_writes_nothing(tiny, say, tmp_path):
    short = [*tiny, "stage=corpus", "corpus.validation_documents=5", f"outputs={tmp_path}/outputs"]
    pending = json.loads(say("plan", *short, "--json"))
    assert not (tmp_path / "outputs").exists(), "planning writes nothing there"
    say(*short)
    shown = json.loads(say("plan", *short, "--json"))
    (planned,), (step,) = pending["steps"], shown["steps"]
    assert (step["state"], step["key"]) == ("done", planned["key"])


def test_plan_starts_with_downloads_and_duration(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache" / "mlxchat"))
    settings = ["model=d4", "stage=pretrain", "machine.training_flops=1e13", f"outputs={tmp_path}/outputs"]
    head, recipe, offline, *steps = planned(settings, capsys)
    # 6 × 19,922,944 weights + 12 × 4 layers × 256 × 2,048 FLOPs a token, 734,003,200 tokens, at 1e13 a second.
    assert head == (
        "downloads: karpathy/fineweb-edu-100b-shuffle (size unknown), eval_bundle.zip (size unknown). "
        "Pretraining on this machine: about 2h57m (predicted)"
    )
    assert recipe.startswith("recipe: experiment=nanochat, implied by model=")
    assert "corpus=bundled" in offline
    assert steps[0].startswith("corpus ")
    quiet = planned(["experiment=quickstart", *settings], capsys)
    assert quiet[0].startswith("corpus "), "nothing is downloaded"


def planned(settings: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert run_here("plan", *settings) == 0
    return capsys.readouterr().out.splitlines()
