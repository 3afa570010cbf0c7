"""mlxchat plan and mlxchat run --plan, as users meet them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CommandLine = Any


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
