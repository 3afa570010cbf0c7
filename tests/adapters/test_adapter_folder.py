"""Checkpoints of adapters: files, opening, damage, verbs, settings."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from adapters.published import adapter_sizes, publish_adapters
from kit.artifacts import make_model, publish_base, some_ids
from mlxchat.composition.compose import compose_config
from mlxchat.errors import ConfigError, StoreError
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.lora import ADAPTER_CONFIG_FILE, ADAPTERS_FILE, read_adapter_config
from mlxchat.model.parameters import flatten_parameters
from mlxchat.store.bases import find_chain
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

Weights = dict[str, np.ndarray[Any, Any]]


def weights_of(folder: Path) -> Weights:
    return {name: np.asarray(value) for name, value in flatten_parameters(load_checkpoint(folder)[0]).items()}


def logits(folder: Path) -> np.ndarray[Any, Any]:
    return np.asarray(load_checkpoint(folder)[0](some_ids()))


def fused_by_numpy(base: Weights, folder: Path, *, kind: str, bits: int | None = None) -> Weights:
    """Return W + scale (A B)ᵀ in float64; with DoRA, rows have magnitude m."""
    config, arrays = json.loads((folder / ADAPTER_CONFIG_FILE).read_text()), load_file(folder / ADAPTERS_FILE)
    result = {name: value.astype(np.float64) for name, value in base.items()}
    for name, value in base.items():
        if bits is not None and name.startswith("transformer.h.") and "gate" not in name:
            packed = mx.quantize(mx.array(value), group_size=64, bits=bits)
            result[name] = np.asarray(mx.dequantize(*packed, group_size=64, bits=bits)).astype(np.float64)
    parameters = config["lora_parameters"]
    for key in parameters["keys"]:
        a, b = (arrays[f"{key}.lora_{letter}"].astype(np.float64) for letter in "ab")
        matrix = result[f"{key}.weight"] + parameters["scale"] * (a @ b).T
        if kind == "dora":
            matrix *= (arrays[f"{key}.m"] / np.linalg.norm(matrix, axis=1))[:, None]
        result[f"{key}.weight"] = matrix
    return result


@pytest.mark.parametrize(
    ("architecture", "kind", "bits"), [("oct2025", "lora", 4), ("oct2025", "dora", None), ("jul2026", "dora", 4)]
)
def test_opened_weights_are_fused(tmp_path, architecture, kind, bits):
    base = publish_base(tmp_path / "outputs", architecture=architecture)
    tuned = publish_adapters(tmp_path / "outputs", base, kind=kind, bits=bits)
    assert not (tuned / "model.safetensors").exists()
    plain, found = weights_of(base), weights_of(tuned)
    expected = fused_by_numpy(plain, tuned, kind=kind, bits=bits)
    assert expected.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    changed = {name for name, value in plain.items() if not np.array_equal(value, found[name])}
    assert len(changed) >= len(adapter_sizes(make_model(architecture).sizes).targets)


def test_missing_base_is_named(tmp_path):
    base = publish_base(tmp_path / "outputs")
    tuned = publish_adapters(tmp_path / "outputs", base)
    shutil.rmtree(base)
    rid = json.loads((tuned / "checkpoint.json").read_text())["adapter"]["base"]["rid"]
    with pytest.raises(StoreError, match=f"{tuned.name} is an adapter whose base {rid[:16]} is not.*mlxchat push"):
        load_checkpoint(tuned)


def test_names_within_layers_select_the_last_layers(tmp_path):
    for keys, num_layers, expected in ((["attn.c_q"], 1, [1]), (["attn.c_q"], 0, [0, 1])):  # 0: all, as in mlx-lm
        parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": keys}
        record = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
        (tmp_path / ADAPTER_CONFIG_FILE).write_text(json.dumps(record))
        found = read_adapter_config(tmp_path, make_model().sizes).targets
        assert list(found) == [f"transformer.h.{layer}.attn.c_q" for layer in expected]


def test_verbs_accept_adapters(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    outputs = tmp_path / "outputs"
    tuned = publish_adapters(outputs, publish_base(outputs), "sft", bits=8)
    base = resolve(Store(outputs), "base")
    assert command("chat", "sft", "-p", "How many windows?", "--max-tokens", "3")[0] == 0
    assert base.name in command("lineage", "sft")[1]
    assert "adapters.safetensors" in command("show", "sft")[1]
    code, printed = command("push", "sft", tmp_path / "place")
    assert code == 0, printed
    code, printed = command("pull", tmp_path / "place", f"outputs={tmp_path / 'there'}")
    assert code == 0, printed
    np.testing.assert_array_equal(logits(resolve(Store(tmp_path / "there"), tuned.name)), logits(tuned))
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1] + b"x")
    code, printed = command("export", "sft", "--to", "mlx", "out")
    assert code == 2
    assert "is damaged: model.safetensors has other contents than its manifest says" in printed
    assert not Path("out").exists()


@pytest.mark.slow
def test_stacked_adapters_train_and_fuse(mlxchat, tmp_path):
    settings = ("experiment=smoke", "adapter=lora", "adapter.rank=2", "midtrain.adapter.kind=dora")
    done = mlxchat(*settings, "+pipeline.fused={stage: fused, checkpoint: rl}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / "outputs")
    chain = find_chain(resolve(store, "rl"))
    assert [read_manifest(folder)["step"] for folder in chain] == ["rl", "sft", "midtrain", "pretrain"]
    found = [logits(folder) for folder in chain]
    # After so short a training, RL gets no reward and no gradient.
    assert all(not np.array_equal(upper, lower) for upper, lower in pairwise(found[1:]))
    np.testing.assert_array_equal(logits(resolve(store, "fused")), found[0])


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        ("adapter=lora adapter.kind=lara", ['adapter.kind is "lara", expected one of none, lora, dora.']),
        (
            "adapter=lora adapter.rank=0 adapter.bits=3 adapter.group_size=48 adapter.dropout=1",
            ["adapter.rank is 0, expected at least 1", "adapter.bits is 3, expected one of 4, 8",
             "adapter.group_size is 48, expected one of 32, 64, 128", "adapter.dropout is 1"],
        ),
        ("adapter.rank=4", ["there is no adapter. Choose adapter=lora"]),
        ("adapter=lora rl.adapter.rank=0", ["rl.adapter.rank is 0"]),
        ("adapter=lora sft.warm_start=true pipeline.sft.checkpoint=pretrain", ["start is true, but sft.adapter"]),
    ],
)  # fmt: skip
def test_impossible_values_are_one_line_each(overrides, messages):
    with pytest.raises(ConfigError) as caught:
        compose_config(["experiment=smoke", *overrides.split()])
    for message in messages:
        assert len([line for line in str(caught.value).splitlines() if message in line]) == 1, message
