"""Our adapters in mlx-lm: equal logits and equal fused models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.artifacts import publish_adapters, publish_base, some_ids
from kit.commands import run_here
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

mlx_lm = pytest.importorskip("mlx_lm")


def logits(model: Any) -> np.ndarray[Any, Any]:
    return np.asarray(model(some_ids()))


@pytest.mark.parametrize(("architecture", "kind"), [("oct2025", "lora"), ("jul2026", "dora")])
def test_mlx_lm_opens_artifacts_with_our_logits(tmp_path: Path, architecture: str, kind: str) -> None:
    base = publish_base(tmp_path / "outputs", architecture=architecture)
    tuned = publish_adapters(tmp_path / "outputs", base, kind=kind)
    trust = architecture == "jul2026"
    theirs, _ = mlx_lm.load(str(base), adapter_path=str(tuned), trust_remote_code=trust)
    ours = logits(load_checkpoint(tuned)[0])
    np.testing.assert_allclose(logits(theirs), ours, atol=1e-3)
    assert np.abs(logits(load_checkpoint(base)[0]) - ours).max() > 1  # the adapters have an effect


def test_stacked_adapters_are_exported(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    below = publish_adapters(outputs, publish_base(outputs), "sft")
    above = publish_adapters(outputs, below, "rl", "dora", seed=9)
    export(below, "mlx", tmp_path / "base")
    export(above, "mlx-adapter", tmp_path / "above")
    card = (tmp_path / "above" / "README.md").read_text()
    assert "also has adapters" in card
    assert f"mlxchat export {below.name} --to mlx BASE" in card.replace("\\", "")
    theirs, _ = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "above"))
    np.testing.assert_allclose(logits(theirs), logits(load_checkpoint(above)[0]), atol=1e-3)


@pytest.mark.parametrize("bits", [None, 8])
def test_export_for_mlx_lm_fuses_the_adapters(tmp_path: Path, bits: int | None) -> None:
    tuned = publish_adapters(tmp_path / "outputs", publish_base(tmp_path / "outputs"), bits=bits)
    export(tuned, "mlx", tmp_path / "out")
    theirs, _ = mlx_lm.load(str(tmp_path / "out"))
    np.testing.assert_allclose(logits(theirs), logits(load_checkpoint(tuned)[0]), atol=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Its adapters were merged into the weights of" in card
    assert "sha256 of its adapters" in card


def test_export_for_nanochat_fuses_the_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = publish_adapters(tmp_path / "outputs", publish_base(tmp_path / "outputs"), kind="dora")
    export(tuned, "nanochat", tmp_path / "out")
    run_here("import", "nanochat", "out", "--name", "back", f"outputs={tmp_path / 'outputs'}")
    back = load_checkpoint(resolve(Store(tmp_path / "outputs"), "import:back"))[0]
    # nanochat's tables are written in bfloat16 only if that is exact, and have no adapters.
    np.testing.assert_array_equal(logits(back), logits(load_checkpoint(tuned)[0]))


def test_model_without_adapters_has_no_adapter_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = publish_base(tmp_path / "outputs")
    assert run_here("export", base.name, "--to", "mlx-adapter", tmp_path / "out", f"outputs={base.parents[1]}") == 2
    assert "has no adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def export(artifact: Path, target: str, to: Path) -> None:
    assert run_here("export", artifact.name, "--to", target, to, f"outputs={artifact.parents[1]}") == 0
