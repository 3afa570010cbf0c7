"""`mlxchat plan` and `mlxchat explain`."""

import json
import re
from typing import Any

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


def test_plan_of_days_starts_with_its_duration(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mlxchat.planning.duration.measure_flops", lambda dtype: 1e11)
    settings = ["pretrain.num_iterations=10_000_000", "stage=pretrain", f"outputs={tmp_path}/outputs"]
    head, *_ = planned(settings, capsys)
    assert re.fullmatch(r"downloads: nothing. Pretraining on this machine: about \d+d\d\dh \(predicted\)", head)


def test_plan_on_bundled_data_names_the_replacements(tmp_path, capsys):
    settings = ["model=d4", "corpus=bundled", "stage=pretrain", "machine.training_flops=1e13"]
    head, recipe, data, *_ = planned([*settings, f"outputs={tmp_path}/outputs"], capsys)
    assert head.startswith("downloads: nothing. Pretraining on this machine: about ")
    assert recipe.startswith("recipe: experiment=nanochat_bundled, implied by model=")
    assert data == "bundled text, tasks and a vocabulary of 32,768 replace nanochat's"


def planned(settings: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert run_here("plan", *settings) == 0
    return capsys.readouterr().out.splitlines()


def test_settings_have_value_and_meaning(capsys):
    assert run_here("explain", "sft_long", "pipeline=two_sft", "pipeline.sft_long.with.num_epochs=7", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["settings"]["sft.num_epochs"] == {
        "value": 7,
        "means": "Passes over the data; num_iterations takes its place.",
    }
    assert found["settings"]["sft.batch.row_tokens"]["value"] == 256, "parts of the section are listed, too"
