"""`mlxchat explain` prints a stage's declarations and its settings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kit.commands import run_here


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
