"""`mlxchat import adapter`: adapters that mlx-lm trained on our models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kit.artifacts import publish_adapters, publish_base, some_ids
from kit.commands import Command
from mlxchat.errors import DataError
from mlxchat.interop.peft import find_files, import_adapter
from mlxchat.interop.source import open_folder
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def train_there(base: Path, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch, *, trust: bool) -> None:
    """Train adapters on our model with mlx_lm.lora, two iterations."""
    from mlx_lm.lora import main as lora

    data = folder.parent / "data"
    data.mkdir()
    for name in ("train", "valid"):
        rows = [json.dumps({"text": f"The house in the garden had {number} windows."}) for number in range(6)]
        (data / f"{name}.jsonl").write_text("\n".join(rows))
    more = ["--trust-remote-code"] if trust else []
    monkeypatch.setattr(sys, "argv", [
        "lora", "--train", "--model", str(base), "--data", str(data), "--fine-tune-type", kind, "--iters", "2",
        "--batch-size", "2", "--num-layers", "1", "--adapter-path", str(folder), "--learning-rate", "0.05",
        "--val-batches", "1", *more,
    ])  # fmt: skip
    lora()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("architecture", "kind"), [("oct2025", "dora"), ("jul2026", "lora")])
def test_adapters_trained_by_mlx_lm_have_equal_logits(
    outputs: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, kind: str
) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    base = publish_base(outputs, architecture=architecture)
    trust = architecture == "jul2026"
    train_there(base, tmp_path / "there", kind, monkeypatch, trust=trust)
    code, printed = command("import", "adapter", "there", "--base", "base", "--name", "mine")
    assert code == 0, printed
    made = resolve(Store(outputs), "import:mine")
    theirs, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "there"), trust_remote_code=trust)
    found = np.asarray(load_checkpoint(made)[0](some_ids()))
    np.testing.assert_allclose(found, np.asarray(theirs(some_ids())), atol=1e-3)
    assert np.abs(found - np.asarray(load_checkpoint(base)[0](some_ids()))).max() > 0.01
    assert read_manifest(made)["inputs"]["checkpoint"]["rid"] == read_manifest(base)["rid"]
    assert {Path(file["url"]).name for file in read_manifest(made)["externals"]} == {
        "adapters.safetensors", "adapter_config.json",
    }  # fmt: skip
    assert command("fuse", "import:mine")[0] == 0


def foreign(folder: Path, tuned: Path, dtype: mx.Dtype = mx.float32) -> Path:
    """Write an artifact's adapters in mlx-lm's format."""
    folder.mkdir()
    arrays = {name: mx.array(value).astype(dtype) for name, value in load_file(tuned / "adapters.safetensors").items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    (folder / "adapter_config.json").write_bytes((tuned / "adapter_config.json").read_bytes())
    return folder


def test_imported_adapters_have_mlx_lms_logits(outputs: Path, command: Command, tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    base = publish_base(outputs)
    foreign(tmp_path / "there", publish_adapters(outputs, base))
    publish_base(outputs, "other", seed=8)
    command("import", "adapter", "there", "--base", "base", "--name", "a")
    command("import", "adapter", "there", "--base", "other", "--name", "b")
    a, b = (resolve(Store(outputs), f"import:{name}") for name in "ab")
    assert read_manifest(a)["tree"] != read_manifest(b)["tree"], "the base is part of the identity"
    assert read_manifest(a)["inputs"]["checkpoint"]["rid"] == read_manifest(base)["rid"]
    theirs, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "there"))
    found = np.asarray(load_checkpoint(a)[0](some_ids()))
    np.testing.assert_allclose(found, np.asarray(theirs(some_ids())), atol=1e-3)


def test_bfloat16_is_widened(outputs: Path, tmp_path: Path) -> None:
    base, out = publish_base(outputs), tmp_path / "out"
    tuned = publish_adapters(outputs, base)
    out.mkdir()
    source = open_folder(foreign(tmp_path / "there", tuned, mx.bfloat16))
    import_adapter(source, find_files(source), base, out, chats=None, check=lambda: None)
    found = load_file(out / "adapters.safetensors")
    for name, value in load_file(tuned / "adapters.safetensors").items():
        expected = mx.array(value).astype(mx.bfloat16).astype(mx.float32)
        np.testing.assert_array_equal(found[name], np.asarray(expected))


def _without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _poison(folder: Path) -> None:
    arrays = load_file(folder / "adapters.safetensors")
    first = sorted(arrays)[0]
    arrays[first][0] = np.nan
    save_file(arrays, folder / "adapters.safetensors")


def _config(folder: Path, **more: Any) -> None:
    record = json.loads((folder / "adapter_config.json").read_text())
    record["lora_parameters"] |= more
    (folder / "adapter_config.json").write_text(json.dumps(record))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no arrays": (lambda folder: _without(folder, "adapters.safetensors"), "has no adapters.safetensors"),
    "cut": (lambda folder: (folder / "adapters.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"{"), "is truncated"),
    "not finite": (_poison, "has NaN or infinity"),
    "a huge scale": (lambda folder: _config(folder, scale=10**400), "is not a finite number"),
    "another rank": (lambda folder: _config(folder, rank=5), "adapters do not fit adapter_config.json and the model"),
    "another model": (lambda folder: _config(folder, keys=["model.layers.0.q_proj"]), "is not a matrix of the model"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_faulty_adapters_are_refused_before_writing(outputs: Path, tmp_path: Path, fault: str) -> None:
    base = publish_base(outputs)
    there, out = foreign(tmp_path / "there", publish_adapters(outputs, base)), tmp_path / "out"
    out.mkdir()
    break_it, reason = BROKEN[fault]
    break_it(there)
    source = open_folder(there)
    with pytest.raises(DataError, match=reason):
        import_adapter(source, find_files(source), base, out, chats=None, check=lambda: None)
    assert list(out.iterdir()) == []


def test_base_is_required_and_must_exist(outputs: Path, command: Command, tmp_path: Path) -> None:
    foreign(tmp_path / "there", publish_adapters(outputs, publish_base(outputs)))
    for options, message in (([], "--base"), (["--base", "nothing"], '"nothing" is no artifact')):
        code, printed = command("import", "adapter", "there", *options)
        assert code == 2
        assert message in printed
