"""`mlxchat fuse`, other verbs on checkpoints of adapters, and the whole pipeline with adapters in every stage."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.artifacts import publish_adapters, publish_base, some_ids
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.store.bases import find_chain
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "outputs"
    publish_adapters(place, publish_base(place), "sft", bits=8)
    return place


def logits(folder: Path) -> np.ndarray[Any, Any]:
    return np.asarray(load_checkpoint(folder)[0](some_ids()))


def test_fused_model_needs_no_base(outputs, command):
    tuned, base = resolve(Store(outputs), "sft"), resolve(Store(outputs), "base")
    code, printed = command("fuse", "sft")
    assert code == 0, printed
    fused = resolve(Store(outputs), "fused")
    assert f"{tuned.name} fused: {fused.name}" in printed
    assert fused.name.startswith("fused-d2-")
    manifest = read_manifest(fused)
    assert manifest["inputs"]["checkpoint"]["rid"] == read_manifest(tuned)["rid"]
    assert command("verify", fused.name)[0] == 0
    runs = len(list((outputs / "runs").iterdir()))
    assert "fused: fused-" in command("fuse", tuned.name)[1]
    assert len(list((outputs / "runs").iterdir())) == runs
    expected = logits(tuned)
    facts = json.loads((fused / "checkpoint.json").read_text())
    assert (facts["stage"], facts["format"]) == ("sft", "chat")
    assert "adapter" not in facts
    shutil.rmtree(base)
    np.testing.assert_array_equal(logits(fused), expected)


def test_model_without_adapters_is_not_fused(outputs, command):
    code, printed = command("fuse", "base")
    assert code == 2
    assert "has no adapters to fuse" in printed
    assert not (outputs / "runs").exists() or not list((outputs / "runs").iterdir())


def test_damaged_base_is_not_fused(outputs, command):
    base = resolve(Store(outputs), "base")
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, printed = command("fuse", "sft")
    assert code == 2
    assert f"{base.name}, which fused needs, is damaged" in printed
    assert not list((outputs / "store").glob("fused-*"))
    code, printed = command("export", "sft", "--to", "mlx", "out")
    assert "differs from its manifest" in printed
    assert not Path("out").exists()


@pytest.mark.parametrize("content", ["[" * 99999, None])
def test_unreadable_config_of_the_base_is_refused(outputs, command, content):
    config = resolve(Store(outputs), "base") / "config.json"
    config.unlink() if content is None else config.write_text(content)
    code, printed = command("export", "sft", "--to", "mlx", "out")
    assert code == 2
    assert "not a readable checkpoint" in printed
    assert not Path("out").exists()


def test_pushed_adapters_bring_their_base(outputs, command, tmp_path):
    expected = logits(resolve(Store(outputs), "sft"))
    name = resolve(Store(outputs), "sft").name
    assert command("push", "sft", tmp_path / "it.tar")[0] == 0
    code, printed = command("pull", tmp_path / "it.tar", f"outputs={tmp_path / 'there'}")
    assert code == 0, printed
    there = resolve(Store(tmp_path / "there"), name)
    np.testing.assert_array_equal(logits(there), expected)
    assert command("verify", there.name, f"outputs={tmp_path / 'there'}")[0] == 0


def test_other_verbs_accept_adapters(outputs, command):
    code, printed = command("chat", "--model", "sft", "-p", "How many windows?", "--max-tokens", "3")
    assert code == 0, printed
    from mlxchat.serve.models import Models
    from mlxchat.store.naming import find_model

    models = Models(Store(outputs), find_model(Store(outputs), None).place)
    assert models.find("sft").converses
    tuned, base = (resolve(Store(outputs), name).name for name in ("sft", "base"))
    assert base in command("lineage", "sft")[1]
    assert tuned in command("lineage", "base", "--down")[1]
    assert "adapters.safetensors" in command("show", "sft")[1]


def test_memory_of_a_teacher_with_adapters_is_predicted(outputs):
    from mlxchat.training.forecast_finetune import measure_teacher

    tuned, base = (resolve(Store(outputs), name) for name in ("sft", "base"))
    assert measure_teacher(tuned) == measure_teacher(base)


def test_opening_adapters_needs_little_memory(tmp_path):
    """At most the file's arrays or one additional matrix, beside the result."""
    tuned = publish_adapters(tmp_path / "outputs", publish_base(tmp_path / "outputs"), bits=4)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_checkpoint(tuned)[0]
    size, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    assert model is not None
    assert peak < 1.5 * size


@pytest.mark.slow
def test_stacked_adapters_train_fuse_and_open_in_mlx_lm(mlxchat, tmp_path):
    done = mlxchat("experiment=smoke", "adapter=lora", "adapter.rank=2", "midtrain.adapter.kind=dora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / "outputs")
    chain = find_chain(resolve(store, "rl"))
    assert [read_manifest(folder)["step"] for folder in chain] == ["rl", "sft", "midtrain", "pretrain"]
    found = [logits(folder) for folder in chain]
    # After so short a training, RL gets no reward and no gradient.
    assert all(not np.array_equal(upper, lower) for upper, lower in pairwise(found[1:]))

    assert mlxchat("fuse", "rl", cwd=tmp_path).returncode == 0
    store.forget()
    np.testing.assert_array_equal(logits(resolve(store, "fused")), found[0])
    again = mlxchat("plan", "experiment=smoke", "adapter=lora", "adapter.rank=2", "midtrain.adapter.kind=dora",
                    "--exit-code", cwd=tmp_path)  # fmt: skip
    assert again.returncode == 0, again.stdout

    mlx_lm = pytest.importorskip("mlx_lm")
    base, tuned = resolve(store, "pretrain"), resolve(store, "midtrain")
    theirs, _ = mlx_lm.load(str(base), adapter_path=str(tuned))
    np.testing.assert_allclose(np.asarray(theirs(some_ids())), logits(tuned), atol=1e-3)
