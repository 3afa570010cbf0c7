"""`mlxchat explain` prints a stage's declarations and its settings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kit.commands import run_here
from mlxchat.commands.plan import describe_stage
from mlxchat.runner.stage import Stages


def test_every_stage_is_explained() -> None:
    for name, stage in Stages([]).items():
        found = describe_stage(name, [])
        assert found["does"]
        assert len(found["reads"]) == len(stage.roles)
        assert (found["produces"], found["metrics"], found["version"]) == (stage.produces, stage.metrics, stage.version)
        assert all(key.startswith(f"{name}.") for key in found["settings"])


def test_settings_have_value_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("explain", "sft_long", "pipeline=two_sft", "pipeline.sft_long.with.num_epochs=7", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["settings"]["sft.num_epochs"] == {"value": 7, "means": "Passes over the mixture."}
    assert found["settings"]["sft.batch.row_tokens"]["value"] == 256, "parts of the section are listed, too"


def test_long_values_are_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("explain", "sft", "mixture@sft.mixture=bundled_sft") == 0
    lines = capsys.readouterr().out.splitlines()
    mixture = next(line for line in lines if line.startswith("  sft.mixture"))
    assert "facts, kinds_mc" in mixture
    assert "…" in mixture
    assert len(mixture) < 100


def test_misspelt_stage_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("explain", "stf") == 2
    assert 'Did you mean "sft"?' in capsys.readouterr().err
