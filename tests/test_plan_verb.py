"""mlxchat plan, as users meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.commands import CommandLine, run_here


@pytest.fixture
def short(tiny: tuple[str, ...], tmp_path: Path) -> list[str]:
    return [*tiny, "stage=corpus", "corpus.validation_documents=5", f"outputs={tmp_path}/outputs"]


def test_a_plan_writes_nothing_and_says_by_its_exit_code_whether_all_is_done(
    short: list[str], mlxchat: CommandLine, tmp_path: Path
) -> None:
    pending = mlxchat("plan", *short, "--json", "--exit-code")
    assert pending.returncode == 3, pending.stderr
    assert not (tmp_path / "outputs").exists(), "planning writes nothing there"
    assert mlxchat(*short).returncode == 0
    shown = mlxchat("plan", *short, "--json", "--exit-code")
    assert shown.returncode == 0
    (planned,), (step,) = json.loads(pending.stdout)["steps"], json.loads(shown.stdout)["steps"]
    assert (step["state"], step["rid"]) == ("done", planned["rid"])


def test_a_plan_of_nanochats_recipe_begins_with_its_downloads_and_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan model=dN` named neither the gigabytes that it downloads nor the days that it takes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache" / "mlxchat"))
    settings = ["model=d4", "stage=pretrain", "machine.training_flops=1e13", f"outputs={tmp_path}/outputs"]
    recipe, downloads, offline, time, *steps = planned(settings, capsys)
    assert recipe.startswith("recipe: experiment=nanochat, implied by model=")
    # 1,400 iterations of 524,288 tokens of 4.8 characters, 10 % to spare, 2.6 characters a byte; CORE's bundle.
    assert downloads == "downloads: about 1.7 GB (1.5 GB of text, 162.0 MB of tasks and CORE)"
    assert "corpus=bundled" in offline
    # 6 × 19,922,944 weights + 12 × 4 layers × 256 × 2,048 FLOPs a token, 734,003,200 tokens, at 1e13 a second.
    assert time == "pretraining on this machine: about 2h57m"
    assert steps[0].startswith("corpus ")
    quiet = planned(["experiment=quickstart", *settings], capsys)
    assert quiet[0].startswith("corpus "), "nothing is downloaded"


def test_a_plan_on_bundled_data_says_what_stands_in_for_nanochats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["model=d4", "corpus=bundled", "stage=pretrain", "machine.training_flops=1e13"]
    recipe, downloads, time, *_ = planned([*settings, f"outputs={tmp_path}/outputs"], capsys)
    assert recipe.startswith("recipe: experiment=nanochat_bundled, implied by model=")
    assert downloads.startswith("downloads: nothing. Bundled text, tasks and a vocabulary of 32,768 stand in")
    assert time.startswith("pretraining on this machine: about ")


def planned(settings: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that `mlxchat plan` prints."""
    assert run_here("plan", *settings) == 0
    return capsys.readouterr().out.splitlines()
