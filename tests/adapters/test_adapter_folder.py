"""A checkpoint that holds adapters alone: what it is on disk, and how it is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kit.artifacts import (
    adapter_sizes,
    make_model,
    publish,
    publish_adapters,
    publish_base,
    random_adapters,
    some_ids,
)
from mlxchat.errors import DataError, MlxchatError, StoreError
from mlxchat.model.checkpoint import load_checkpoint, save_adapters, save_checkpoint
from mlxchat.model.gpt import flatten_parameters, set_parameters
from mlxchat.model.lora import ADAPTER_CONFIG_FILE, ADAPTERS_FILE, read_adapter_config
from mlxchat.store.bases import find_chain
from mlxchat.store.manifest import read_manifest
from mlxchat.store.store import Store

Weights = dict[str, np.ndarray[Any, Any]]


def weights_of(folder: Path) -> Weights:
    return {name: np.asarray(value) for name, value in flatten_parameters(load_checkpoint(folder)[0]).items()}


def rounded(matrix: np.ndarray[Any, Any], bits: int, group: int = 64) -> np.ndarray[Any, Any]:
    """Return the nearest numbers that MLX's affine quantisation has, as its documentation says, but for ties."""
    import mlx.core as mx

    packed = mx.quantize(mx.array(matrix), group_size=group, bits=bits)
    return np.asarray(mx.dequantize(*packed, group_size=group, bits=bits))


def fused_by_numpy(base: Weights, folder: Path, *, kind: str, bits: int | None = None) -> Weights:
    """Return W + scale (A B)ᵀ in float64, rows of the length m with DoRA."""
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


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_it_opens_as_the_base_with_the_adapters_in_its_weights(
    tmp_path: Path, architecture: str, kind: str, bits: int | None
) -> None:
    base = publish_base(tmp_path / "outputs", architecture=architecture)
    tuned = publish_adapters(tmp_path / "outputs", base, kind=kind, bits=bits)
    assert not (tuned / "model.safetensors").exists()
    expected, found = fused_by_numpy(weights_of(base), tuned, kind=kind, bits=bits), weights_of(tuned)
    assert expected.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    changed = {name for name, value in weights_of(base).items() if not np.array_equal(value, found[name])}
    assert len(changed) >= len(adapter_sizes(make_model(architecture).sizes).targets)


def test_adapters_on_adapters_on_a_model_are_one_model(tmp_path: Path) -> None:
    base = publish_base(tmp_path / "outputs")
    below = publish_adapters(tmp_path / "outputs", base, "sft", "dora")
    above = publish_adapters(tmp_path / "outputs", below, "rl", "lora", seed=9)
    expected = fused_by_numpy(fused_by_numpy(weights_of(base), below, kind="dora"), above, kind="lora")
    for name, value in weights_of(above).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_facts_of_a_model_made_from_adapters_do_not_call_it_adapters(tmp_path: Path) -> None:
    tuned = publish_adapters(tmp_path / "outputs", publish_base(tmp_path / "outputs"))
    model, tokenizer, facts = load_checkpoint(tuned)
    whole = publish(tmp_path / "outputs", "whole", lambda out: save_checkpoint(out, model, tokenizer, facts))
    assert facts["format"] == "chat"
    np.testing.assert_array_equal(load_checkpoint(whole)[0](some_ids()), model(some_ids()))


def test_equal_adapters_on_other_weights_are_other_contents(tmp_path: Path) -> None:
    trees = []
    for seed in (3, 4):
        outputs = tmp_path / f"outputs{seed}"
        tuned = publish_adapters(outputs, publish_base(outputs, seed=seed))
        trees.append((read_manifest(tuned)["tree"], (tuned / ADAPTERS_FILE).read_bytes()))
    assert trees[0][1] == trees[1][1]
    assert trees[0][0] != trees[1][0]


def test_the_same_adapters_are_the_same_bytes(tmp_path: Path) -> None:
    trees = set()
    for name in ("a", "b"):
        tuned = publish_adapters(tmp_path / name, publish_base(tmp_path / name))
        trees.add(read_manifest(tuned)["tree"])
    assert len(trees) == 1


def test_a_base_that_is_gone_is_named_with_what_to_do(tmp_path: Path) -> None:
    base = publish_base(tmp_path / "outputs")
    tuned = publish_adapters(tmp_path / "outputs", base)
    shutil.rmtree(base)
    rid = json.loads((tuned / "checkpoint.json").read_text())["adapter"]["base"]["rid"]
    with pytest.raises(StoreError, match=f"{tuned.name} is an adapter whose base {rid[:16]} is not.*mlxchat push"):
        load_checkpoint(tuned)


def test_a_folder_outside_a_store_has_no_base(tmp_path: Path) -> None:
    tuned = publish_adapters(tmp_path / "outputs", publish_base(tmp_path / "outputs"))
    shutil.copytree(tuned, tmp_path / "elsewhere" / tuned.name)
    with pytest.raises(StoreError, match=r"whose base .* is not in the same store"):
        load_checkpoint(tmp_path / "elsewhere" / tuned.name)


def test_a_base_that_is_made_again_with_other_contents_leaves_the_adapters_theirs(tmp_path: Path) -> None:
    """It was replaced under its id, as may happen on another machine, and the adapters could no longer be used."""
    base = publish_base(tmp_path / "outputs")
    tuned = publish_adapters(tmp_path / "outputs", base)
    shutil.rmtree(tmp_path / "outputs" / "work")
    assert publish_base(tmp_path / "outputs", seed=8) != base
    assert find_chain(tuned) == [tuned, base]
    load_checkpoint(tuned)


def test_adapters_that_rest_on_each_other_are_refused(tmp_path: Path) -> None:
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
    "no arrays": (lambda folder: (folder / ADAPTERS_FILE).unlink(), "no readable adapters.safetensors"),
    "cut arrays": (
        lambda folder: (folder / ADAPTERS_FILE).write_bytes((folder / ADAPTERS_FILE).read_bytes()[:-9]),
        "no readable adapters.safetensors",
    ),
    "no config": (lambda folder: (folder / ADAPTER_CONFIG_FILE).unlink(), "no readable adapter_config.json"),
    "config is text": (lambda folder: (folder / ADAPTER_CONFIG_FILE).write_text("rank: 8"), "no readable adapter_conf"),
    "config is a list": (lambda folder: (folder / ADAPTER_CONFIG_FILE).write_text("[]"), "no readable adapter_config"),
    "config nests": (lambda folder: (folder / ADAPTER_CONFIG_FILE).write_text("[" * 99999), "no readable adapter_conf"),
    "kind": (_edit(ADAPTER_CONFIG_FILE, lambda it: it.update(fine_tune_type="full")), "'full' is neither lora nor"),
    "kind is a list": (_edit(ADAPTER_CONFIG_FILE, lambda it: it.update(fine_tune_type=[])), "is neither lora nor dora"),
    "rank": (_edit(ADAPTER_CONFIG_FILE, lambda it: it["lora_parameters"].update(rank="8")), "rank '8' is no whole"),
    "scale": (
        _edit(ADAPTER_CONFIG_FILE, lambda it: it["lora_parameters"].update(scale=float("nan"))), "scale nan is no num"
    ),
    "layers": (_edit(ADAPTER_CONFIG_FILE, lambda it: it.update(num_layers=None)), "num_layers None is no whole"),
    "keys": (_edit(ADAPTER_CONFIG_FILE, lambda it: it["lora_parameters"].update(keys=["../x"])), "../x is no matrix"),
    "no keys": (_edit(ADAPTER_CONFIG_FILE, lambda it: it["lora_parameters"].update(keys=[])), "names no matrices"),
    "keys of a kind": (_edit(ADAPTER_CONFIG_FILE, lambda it: it["lora_parameters"].update(keys=7)), "no list of names"),
    "one less": (_arrays(lambda it: it.pop(f"{FIRST}.lora_a")), f"{FIRST}.lora_a is absent, expected .64, 4."),
    "one more": (_arrays(lambda it: it.update(other=np.ones(3, np.float32))), "other is .3., expected absent"),
    "shape": (
        _arrays(lambda it: it.update({f"{FIRST}.lora_b": np.ones((3, 64), np.float32)})), ".3, 64., expected .4, 64."
    ),
    "type": (
        _arrays(lambda it: it.update({f"{FIRST}.lora_b": np.ones((4, 64), np.int32)})), "holds int32, expected float32"
    ),
    "no base": (_edit("checkpoint.json", lambda it: it["adapter"].pop("base")), "does not name the base"),
    "a strange base": (
        _edit("checkpoint.json", lambda it: it["adapter"]["base"].update(rid="../../../etc")), "not in the same store"
    ),
    "strange bits": (_edit("checkpoint.json", lambda it: it["adapter"].update(bits=3)), "bits 3, group_size 64 are"),
    "facts nest": (lambda folder: (folder / "checkpoint.json").write_text("[" * 99999), "cannot be read"),
    "no facts of it": (_edit("checkpoint.json", lambda it: it.update(adapter=[])), "adapter is not an object"),
    "another model": (_edit("config.json", lambda it: it.update(num_attention_heads=1)), "another model than its base"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused_with_the_reason(tmp_path: Path, fault: str) -> None:
    tuned = publish_adapters(tmp_path / "outputs", publish_base(tmp_path / "outputs"))
    break_it, reason = BROKEN[fault]
    break_it(tuned)
    with pytest.raises(MlxchatError, match=reason):
        load_checkpoint(tuned)


def test_names_within_layers_mean_the_last_layers_as_in_mlx_lm(tmp_path: Path) -> None:
    sizes = make_model().sizes
    for keys, num_layers, expected in (
        (["attn.c_q"], 1, ["transformer.h.1.attn.c_q"]),
        (["attn.c_q"], 0, ["transformer.h.0.attn.c_q", "transformer.h.1.attn.c_q"]),  # mlx-lm's [-0:] is all of them
        (["attn.c_q", "transformer.h.0.mlp.c_fc"], 1, ["transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_q"]),
    ):
        record = {
            "fine_tune_type": "lora", "num_layers": num_layers,
            "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": keys},
        }  # fmt: skip
        (tmp_path / ADAPTER_CONFIG_FILE).write_text(json.dumps(record))
        assert list(read_adapter_config(tmp_path, sizes).targets) == expected


def test_an_adapter_is_kept_together_with_its_base_by_gc(tmp_path: Path) -> None:
    from mlxchat.store.gc import Limits, find_garbage

    outputs = tmp_path / "outputs"
    base = publish_base(outputs)
    tuned = publish_adapters(outputs, base)
    (outputs / "refs" / "latest" / "base").unlink()
    limits = Limits(keep_last=0, older_than_seconds=None, max_bytes=None)
    assert find_garbage(Store(outputs), limits).garbage == []
    (outputs / "refs" / "latest" / "tuned").unlink()
    assert {item.path.name for item in find_garbage(Store(outputs), limits).garbage} == {base.name, tuned.name}


@pytest.mark.parametrize(("kind", "bits"), [("lora", None), ("dora", None), ("lora", 4), ("dora", 8)])
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_what_is_opened_says_what_the_model_said_in_which_adapters_were_trained(
    tmp_path: Path, architecture: str, kind: str, bits: int | None
) -> None:
    """There the adapters compute beside the base's matrices, here they are in them."""
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
