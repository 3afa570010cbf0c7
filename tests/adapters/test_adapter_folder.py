"""Checkpoints of adapters: files, opening, damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kit.artifacts import adapter_sizes, make_model, publish, publish_adapters, publish_base, random_adapters, some_ids
from mlxchat.errors import DataError, MlxchatError, StoreError
from mlxchat.model.checkpoint import load_checkpoint, save_adapters
from mlxchat.model.gpt import flatten_parameters, set_parameters
from mlxchat.model.lora import ADAPTER_CONFIG_FILE, ADAPTERS_FILE, read_adapter_config
from mlxchat.store.bases import find_chain
from mlxchat.store.manifest import read_manifest
from mlxchat.store.store import Store

Weights = dict[str, np.ndarray[Any, Any]]


def weights_of(folder: Path) -> Weights:
    return {name: np.asarray(value) for name, value in flatten_parameters(load_checkpoint(folder)[0]).items()}


def rounded(matrix: np.ndarray[Any, Any], bits: int, group: int = 64) -> np.ndarray[Any, Any]:
    """Return a matrix rounded by MLX's affine quantisation."""
    import mlx.core as mx

    packed = mx.quantize(mx.array(matrix), group_size=group, bits=bits)
    return np.asarray(mx.dequantize(*packed, group_size=group, bits=bits))


def fused_by_numpy(base: Weights, folder: Path, *, kind: str, bits: int | None = None) -> Weights:
    """Return W + scale (A B)ᵀ in float64; with DoRA, rows have magnitude m."""
    config, arrays = json.loads((folder / ADAPTER_CONFIG_FILE).read_text()), load_file(folder / ADAPTERS_FILE)
    result = {name: value.astype(np.float64) for name, value in base.items()}
    if bits is not None:
        for name, value in base.items():
            if name.startswith("transformer.h.") and "gate" not in name:
                result[name] = rounded(value, bits).astype(np.float64)
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
    expected, found = fused_by_numpy(weights_of(base), tuned, kind=kind, bits=bits), weights_of(tuned)
    assert expected.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    changed = {name for name, value in weights_of(base).items() if not np.array_equal(value, found[name])}
    assert len(changed) >= len(adapter_sizes(make_model(architecture).sizes).targets)


def test_stacked_adapters_are_fused(tmp_path):
    base = publish_base(tmp_path / "outputs")
    below = publish_adapters(tmp_path / "outputs", base, "sft", "dora")
    above = publish_adapters(tmp_path / "outputs", below, "rl", "lora", seed=9)
    expected = fused_by_numpy(fused_by_numpy(weights_of(base), below, kind="dora"), above, kind="lora")
    for name, value in weights_of(above).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_missing_base_is_named(tmp_path):
    base = publish_base(tmp_path / "outputs")
    tuned = publish_adapters(tmp_path / "outputs", base)
    shutil.copytree(tuned, tmp_path / "elsewhere" / tuned.name)
    with pytest.raises(StoreError, match=r"whose base .* is not in the same store"):
        load_checkpoint(tmp_path / "elsewhere" / tuned.name)
    shutil.rmtree(base)
    rid = json.loads((tuned / "checkpoint.json").read_text())["adapter"]["base"]["rid"]
    with pytest.raises(StoreError, match=f"{tuned.name} is an adapter whose base {rid[:16]} is not.*mlxchat push"):
        load_checkpoint(tuned)


def test_recreated_base_does_not_replace_the_original(tmp_path):
    """Guards against a base that is replaced under its id."""
    base = publish_base(tmp_path / "outputs")
    tuned = publish_adapters(tmp_path / "outputs", base)
    shutil.rmtree(tmp_path / "outputs" / "work")
    assert publish_base(tmp_path / "outputs", seed=8) != base
    assert find_chain(tuned) == [tuned, base]
    load_checkpoint(tuned)


def test_circular_bases_are_refused(tmp_path):
    outputs = tmp_path / "outputs"
    base = publish_base(outputs)
    tuned = publish_adapters(outputs, base)
    facts = json.loads((tuned / "checkpoint.json").read_text())
    manifest = read_manifest(tuned)
    facts["adapter"]["base"] = {"rid": manifest["rid"]}
    (tuned / "checkpoint.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="each other's bases"):
        load_checkpoint(tuned)


def _edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / name).read_text())
        change(record)
        (folder / name).write_text(json.dumps(record))

    return edit


def _arrays(change: Callable[[Weights], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        arrays = load_file(folder / ADAPTERS_FILE)
        change(arrays)
        save_file(arrays, folder / ADAPTERS_FILE)

    return edit


FIRST = "transformer.h.0.attn.c_q"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no arrays": (lambda folder: (folder / ADAPTERS_FILE).unlink(), "not a readable adapters.safetensors"),
    "no config": (lambda folder: (folder / ADAPTER_CONFIG_FILE).unlink(), "not a readable adapter_config.json"),
    "config nests": (lambda folder: (folder / ADAPTER_CONFIG_FILE).write_text("[" * 99999), "not a readable adap"),
    "kind": (_edit(ADAPTER_CONFIG_FILE, lambda it: it.update(fine_tune_type="full")), "'full' is neither lora nor"),
    "rank": (_edit(ADAPTER_CONFIG_FILE, lambda it: it["lora_parameters"].update(rank="8")), "rank '8' is not an int"),
    "scale": (
        _edit(ADAPTER_CONFIG_FILE, lambda it: it["lora_parameters"].update(scale=float("nan"))), "scale nan is not"
    ),
    "keys": (_edit(ADAPTER_CONFIG_FILE, lambda it: it["lora_parameters"].update(keys=["../x"])), "x is not a matrix"),
    "one less": (_arrays(lambda it: it.pop(f"{FIRST}.lora_a")), f"{FIRST}.lora_a is absent, expected .64, 4."),
    "shape": (
        _arrays(lambda it: it.update({f"{FIRST}.lora_b": np.ones((3, 64), np.float32)})), ".3, 64., expected .4, 64."
    ),
    "type": (
        _arrays(lambda it: it.update({f"{FIRST}.lora_b": np.ones((4, 64), np.int32)})), "has int32, expected float32"
    ),
    "no base": (_edit("checkpoint.json", lambda it: it["adapter"].pop("base")), "does not name the base"),
    "a strange base": (
        _edit("checkpoint.json", lambda it: it["adapter"]["base"].update(rid="../../../etc")), "not in the same store"
    ),
    "strange bits": (_edit("checkpoint.json", lambda it: it["adapter"].update(bits=3)), "unsupported bits 3"),
    "another model": (_edit("config.json", lambda it: it.update(num_attention_heads=1)), "differs from that of its"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_folders_are_refused(tmp_path, fault):
    tuned = publish_adapters(tmp_path / "outputs", publish_base(tmp_path / "outputs"))
    break_it, reason = BROKEN[fault]
    break_it(tuned)
    with pytest.raises(MlxchatError, match=reason):
        load_checkpoint(tuned)


def test_names_within_layers_select_the_last_layers(tmp_path):
    sizes = make_model().sizes
    for keys, num_layers, expected in (
        (["attn.c_q"], 1, ["transformer.h.1.attn.c_q"]),
        (["attn.c_q"], 0, ["transformer.h.0.attn.c_q", "transformer.h.1.attn.c_q"]),  # all, as mlx-lm's [-0:]
        (["attn.c_q", "transformer.h.0.mlp.c_fc"], 1, ["transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_q"]),
    ):
        record = {
            "fine_tune_type": "lora", "num_layers": num_layers,
            "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": keys},
        }  # fmt: skip
        (tmp_path / ADAPTER_CONFIG_FILE).write_text(json.dumps(record))
        assert list(read_adapter_config(tmp_path, sizes).targets) == expected


def test_gc_keeps_the_base_of_an_adapter(tmp_path):
    from mlxchat.store.gc import Limits, find_garbage

    outputs = tmp_path / "outputs"
    base = publish_base(outputs)
    tuned = publish_adapters(outputs, base)
    (outputs / "refs" / "latest" / "base").unlink()
    limits = Limits(keep_last=0, older_than_seconds=None, max_bytes=None)
    assert find_garbage(Store(outputs), limits).garbage == []
    (outputs / "refs" / "latest" / "tuned").unlink()
    assert {item.path.name for item in find_garbage(Store(outputs), limits).garbage} == {base.name, tuned.name}


@pytest.mark.parametrize(
    ("architecture", "kind", "bits"), [("oct2025", "lora", 4), ("jul2026", "lora", None), ("jul2026", "dora", 8)]
)
def test_opened_model_has_the_trained_models_logits(tmp_path, architecture, kind, bits):
    """In training the adapters are beside the base's matrices, in an opened checkpoint they are fused."""
    from mlxchat.model.gpt import trained_parameters
    from mlxchat.model.lora import attach_adapters

    base = publish_base(tmp_path / "outputs", architecture=architecture)
    trained, tokenizer, facts = load_checkpoint(base)
    sizes = adapter_sizes(trained.sizes, kind, bits=bits)
    attach_adapters(trained, sizes)
    set_parameters(trained, random_adapters(sizes, trained.sizes))

    def write(out: Path) -> None:
        save_adapters(
            out, trained_parameters(trained), sizes, base=base, sizes=trained.sizes, tokenizer=tokenizer, facts=facts
        )

    opened = load_checkpoint(publish(tmp_path / "outputs", "tuned", write, inputs={"checkpoint": base}))[0]
    np.testing.assert_allclose(np.asarray(opened(some_ids())), np.asarray(trained(some_ids())), atol=2e-4)
