"""mlxchat plan and mlxchat run --plan, as users meet them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.commands import CommandLine, run_here


@pytest.fixture
def short(tiny: tuple[str, ...], tmp_path: Path) -> list[str]:
    return [*tiny, "stage=corpus", "corpus.validation_documents=5", f"outputs={tmp_path}/outputs"]


def test_a_saved_plan_runs_exactly_what_was_shown_and_only_once(
    short: list[str], mlxchat: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    pending = mlxchat("plan", *short, "--exit-code", "--save", file)
    assert pending.returncode == 3, pending.stderr
    assert pending.stdout.endswith(f"saved: mlxchat run --plan {file}\n")
    assert not (tmp_path / "outputs").exists(), "planning writes nothing there"
    done = mlxchat("run", "--plan", file)
    assert done.returncode == 0, done.stderr
    again = mlxchat("run", "--plan", file)
    assert again.stdout.startswith("corpus has been done since")
    assert "nothing to do" in again.stdout
    shown = mlxchat("plan", *short, "--json", "--exit-code")
    assert shown.returncode == 0
    (step,) = json.loads(shown.stdout)["steps"]
    (planned,) = json.loads(file.read_text())["steps"]
    assert (step["state"], step["rid"]) == ("done", planned["rid"])


def test_a_saved_plan_takes_no_further_settings_and_no_damage(
    short: list[str], mlxchat: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    assert mlxchat("plan", *short, "--save", file).returncode == 0
    extra = mlxchat("run", "--plan", file, "seed=2")
    assert (extra.returncode, extra.stderr) == (
        2, "error: --plan runs what was saved and takes no further settings, got seed=2\n",
    )  # fmt: skip
    file.write_text(file.read_text().replace('"seed": 42', '"seed": 43'))
    altered = mlxchat("--plan", file)
    assert altered.returncode == 2
    assert altered.stderr.startswith(f"error: --plan: {file} is damaged or was altered")
    assert "Traceback" not in altered.stderr


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
