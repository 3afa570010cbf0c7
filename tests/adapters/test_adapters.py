"""Adapters: checkpoints, opening, damage, settings, products and gradients; exchange with mlx-lm and PEFT."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from kit.artifacts import FACTS, make_model, publish, publish_base, some_ids
from kit.commands import run_here
from kit.models import arrays_of, make_tokenizer
from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import AdapterConfig
from mlxchat.errors import ConfigError, DataError, StoreError
from mlxchat.interop.names import hf_from_ours
from mlxchat.interop.peft import find_files, import_adapter
from mlxchat.interop.source import open_folder
from mlxchat.model.checkpoint import load_checkpoint, save_adapters
from mlxchat.model.forward import Dropping, draw_keys, dropped, dropping, fold
from mlxchat.model.lora import ADAPTER_CONFIG_FILE, ADAPTERS_FILE, LAYERS, LoRALinear, read_adapter_config
from mlxchat.model.sizes import GPTSizes, matrices_of, shapes_of
from mlxchat.store.catalog import find_chain
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

Weights = dict[str, np.ndarray[Any, Any]]


def targets_of(sizes: GPTSizes) -> list[str]:
    """Return all matrices but the last layer's projections."""
    return list(matrices_of(sizes))[:-2]


def publish_adapters(outputs: Path, base: Path, step: str = "tuned", kind: str = "lora", **more: Any) -> Path:
    """Publish adapters without a zero on a base; DoRA's lengths are near those of their rows."""
    sizes, rng = load_checkpoint(base)[0].sizes, np.random.default_rng(5)
    of = AdapterConfig(kind=kind, rank=4, scale=2.5, targets=targets_of(sizes), dropout=0.1, **more)
    arrays = {
        name: mx.array((rng.normal(0, 0.15, shape) if len(shape) > 1 else rng.uniform(1, 3, shape)).astype(np.float32))
        for name, shape in shapes_of(of, sizes).items()
    }

    def write(out: Path) -> None:
        save_adapters(out, arrays, of, base=base, sizes=sizes, tokenizer=make_tokenizer(), facts=dict(FACTS))

    return publish(outputs, step, write, inputs={"checkpoint": base})


def logits_of(folder: Path) -> np.ndarray[Any, Any]:
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
    plain, found = arrays_of(load_checkpoint(base)[0]), arrays_of(load_checkpoint(tuned)[0])
    expected = fused_by_numpy(plain, tuned, kind=kind, bits=bits)
    assert expected.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    changed = {name for name, value in plain.items() if not np.array_equal(value, found[name])}
    assert len(changed) >= len(targets_of(make_model(architecture).sizes))


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
    np.testing.assert_array_equal(logits_of(resolve(Store(tmp_path / "there"), tuned.name)), logits_of(tuned))
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
    found = [logits_of(folder) for folder in chain]
    # After so short a training, RL gets no reward and no gradient.
    assert all(not np.array_equal(upper, lower) for upper, lower in pairwise(found[1:]))
    np.testing.assert_array_equal(logits_of(resolve(store, "fused")), found[0])


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        ("adapter=lora adapter.bits=3 adapter.dropout=1", ["bits is 3, expected one of 4, 8", "dropout is 1"]),
        ("adapter.rank=4", ["there is no adapter. Choose adapter=lora"]),
        ("adapter=lora rl.adapter.rank=0", ["rl.adapter.rank is 0"]),
        ("adapter=lora sft.warm_start=true pipeline.sft.checkpoint=pretrain", ["start is true, but sft.adapter"]),
    ],
)
def test_impossible_values_are_one_line_each(overrides, messages):
    with pytest.raises(ConfigError) as caught:
        compose_config(["experiment=smoke", *overrides.split()])
    for message in messages:
        assert len([line for line in str(caught.value).splitlines() if message in line]) == 1, message


# Products and gradients of adapters: against NumPy in float64 and mlx-lm's layers

IN, OUT, RANK, SCALE, GROUP = 64, 48, 4, 1.7, 32
Numbers = dict[str, np.ndarray]


def make(kind: str, bits: int | None = None, *, seed: int = 0, dropout: float = 0.0) -> tuple[LoRALinear, Numbers]:
    """Return a layer with an adapter, and its nonzero numbers in float64."""
    rng = np.random.default_rng(seed)
    numbers = {
        "w": rng.normal(0, 0.2, (OUT, IN)), "a": rng.normal(0, 0.2, (IN, RANK)), "b": rng.normal(0, 0.3, (RANK, OUT)),
        "m": rng.uniform(1, 3, OUT),
    }  # fmt: skip
    sizes = AdapterConfig(kind=kind, rank=RANK, scale=SCALE, bits=bits, group_size=GROUP, dropout=dropout)
    layer = LAYERS[kind](mx.array(numbers["w"].astype(np.float32)), sizes, mx.float32, key=mx.random.key(0), place=3)
    numbers["w"] = np.asarray(layer.base).astype(np.float64)
    layer.lora_a, layer.lora_b = (mx.array(numbers[name].astype(np.float32)) for name in ("a", "b"))
    if kind == "dora":
        layer.m = mx.array(numbers["m"].astype(np.float32))
    return layer, numbers


def expected(kind: str, x: np.ndarray, numbers: Numbers, *, lengths_of: Numbers | None = None) -> np.ndarray:
    """Return the papers' formula; the rows' lengths, which have no gradient, may come from other numbers."""
    adapted_weight = numbers["w"] + SCALE * (numbers["a"] @ numbers["b"]).T
    if kind == "dora":
        of = lengths_of or numbers
        lengths = np.linalg.norm(of["w"] + SCALE * (of["a"] @ of["b"]).T, axis=1)
        adapted_weight = (numbers["m"] / lengths)[:, None] * adapted_weight
    return x @ adapted_weight.T


@pytest.mark.parametrize(("kind", "bits"), [("lora", None), ("lora", 4), ("dora", None), ("dora", 8)])
def test_product_equals_the_papers(path, kind, bits):
    layer, numbers = make(kind, bits)
    x = np.random.default_rng(1).normal(0, 1, (2, 5, IN))
    out = layer(mx.array(x.astype(np.float32)))
    np.testing.assert_allclose(np.asarray(out), expected(kind, x, numbers), atol=2e-4)


@pytest.mark.parametrize(("kind", "bits"), [("lora", None), ("lora", 4), ("dora", None), ("dora", 4)])
def test_gradients_equal_finite_differences(path, kind, bits):
    (layer, exact), rng = make(kind, bits), np.random.default_rng(2)
    x, cotangent = rng.normal(0, 1, (2, 3, IN)), rng.normal(0, 1, (2, 3, OUT))
    names = {"a": "lora_a", "b": "lora_b", **({"m": "m"} if kind == "dora" else {})}

    def loss(x: mx.array, *small: mx.array) -> mx.array:
        for name, value in zip(names.values(), small, strict=True):
            layer[name] = value
        return (layer(x) * mx.array(cotangent.astype(np.float32))).sum()

    given = [mx.array(x.astype(np.float32)), *(layer[name] for name in names.values())]
    found = mx.grad(loss, argnums=tuple(range(len(given))))(*given)
    for (name, slope), direction_seed in zip(zip(["x", *names], found, strict=True), range(9), strict=False):
        direction = np.random.default_rng(direction_seed).normal(0, 1, slope.shape)

        def moved(by: float, name: str = name, direction: np.ndarray = direction) -> float:
            numbers = {**exact, "x": x}
            numbers[name] = numbers[name] + by * direction
            out = expected(kind, numbers["x"], numbers, lengths_of=exact)
            return float((out * cotangent).sum())

        difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert float((np.asarray(slope) * direction).sum()) == pytest.approx(difference, rel=1e-4, abs=1e-3), name


def test_dropout_applies_only_to_the_adapters_input(path):
    layer, n = make("lora", dropout=0.4)
    x, cotangent = (np.random.default_rng(6).normal(0, 1, (2, 3, width)) for width in (IN, OUT))
    present = Dropping(0.0, mx.array(draw_keys(1, 2, rows=2)))
    seen = np.asarray(dropped(mx.array(x.astype(np.float32)), fold(present.keys, 3), 0.4)).astype(np.float64)
    given = mx.array(x.astype(np.float32))
    with dropping(present):
        out, slopes = mx.vjp(layer, [given], [mx.array(cotangent.astype(np.float32))])
    np.testing.assert_allclose(np.asarray(out[0]), x @ n["w"].T + SCALE * seen @ n["a"] @ n["b"], atol=1e-4)
    kept = seen / np.where(x == 0, 1, x)  # 0 or the scale of dropout
    expected_slopes = cotangent @ n["w"] + kept * (SCALE * cotangent @ n["b"].T @ n["a"].T)
    np.testing.assert_allclose(np.asarray(slopes[0]), expected_slopes, atol=1e-4)
    np.testing.assert_allclose(np.asarray(layer(given)), expected("lora", x, n), atol=1e-4)


# Exchange with mlx-lm and PEFT


FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def mlx_lm() -> Any:
    return pytest.importorskip("mlx_lm")


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def export(artifact: Path, target: str, to: str = "out") -> None:
    assert run_here("export", artifact.name, "--to", target, to, f"outputs={artifact.parents[1]}") == 0


def import_from(folder: str, base: Path) -> Path:
    """Import adapters on a base into a new folder, which is returned."""
    out, source = Path("made"), open_folder(Path(folder))
    out.mkdir()
    import_adapter(source, find_files(source), base, out, chats=None, check=lambda: None)
    return out


def test_import_has_mlx_lms_logits_and_its_bases_identity(mlx_lm, outputs, command):
    base = publish_base(outputs)
    export(publish_adapters(outputs, base), "mlx-adapter", "there")
    publish_base(outputs, "other", seed=8)
    for name in ("base", "other"):
        command("import", "adapter", "there", "--base", name, "--name", f"on-{name}")
    made, other = (resolve(Store(outputs), f"import:on-{name}") for name in ("base", "other"))
    assert read_manifest(made)["tree"] != read_manifest(other)["tree"]
    assert read_manifest(made)["inputs"]["checkpoint"]["rid"] == read_manifest(base)["rid"]
    theirs, _ = mlx_lm.load(str(base), adapter_path="there")
    np.testing.assert_allclose(logits_of(made), np.asarray(theirs(some_ids())), atol=1e-3)


@pytest.mark.parametrize(("architecture", "kind"), [("oct2025", "lora"), ("jul2026", "dora")])
def test_mlx_lm_opens_and_fuses_our_adapters(mlx_lm, outputs, monkeypatch, architecture, kind):
    from mlx_lm.fuse import main as fuse

    base = publish_base(outputs, architecture=architecture)
    tuned = publish_adapters(outputs, base, kind=kind)
    trust = architecture == "jul2026"
    ours = logits_of(tuned)
    assert np.abs(logits_of(base) - ours).max() > 1
    export(tuned, "mlx-adapter", "own")
    for folder in (tuned, Path("own")):
        theirs, _ = mlx_lm.load(str(base), adapter_path=str(folder), trust_remote_code=trust)
        np.testing.assert_allclose(np.asarray(theirs(some_ids())), ours, atol=1e-3)
    words = ["fuse", "--model", str(base), "--adapter-path", "own", "--save-path", "there"]
    monkeypatch.setattr(sys, "argv", [*words, *["--trust-remote-code"] * trust])
    fuse()
    export(tuned, "mlx", "merged")
    found, expected = load_file("there/model.safetensors"), load_file("merged/model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_exported_files_give_our_weights_by_pefts_formula(outputs, kind):
    """W + alpha / r × B A; DoRA: rows rescaled to m (PEFT's `LoraLayer` in NumPy). They are imported bit for bit."""
    base = publish_base(outputs)
    tuned = publish_adapters(outputs, base, kind=kind)
    export(tuned, "peft")
    config, arrays = json.loads(Path("out", CONFIG).read_text()), load_file(Path("out", FILE))
    assert (config["peft_type"], config["use_dora"]) == ("LORA", kind == "dora")
    below, expected, changed = arrays_of(load_checkpoint(base)[0]), arrays_of(load_checkpoint(tuned)[0]), 0
    for name, weight in below.items():
        module = hf_from_ours(name).removesuffix(".weight")
        a, b = (arrays.pop(f"base_model.model.{module}.lora_{part}.weight", None) for part in "AB")
        if a is not None and b is not None:
            assert module in config["target_modules"]
            weight = weight + config["lora_alpha"] / config["r"] * (b @ a)
            lengths = arrays.pop(f"base_model.model.{module}.lora_magnitude_vector", None)
            if lengths is not None:
                weight = lengths[:, None] / np.linalg.norm(weight, axis=1, keepdims=True) * weight
            changed += 1
        np.testing.assert_allclose(weight, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert (changed > 0, arrays) == (True, {})
    there, here = (load_file(folder / "adapters.safetensors") for folder in (import_from("out", base), tuned))
    assert there.keys() == here.keys()
    assert all(np.array_equal(there[name], here[name]) for name in here)


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ({"use_rslora": True, "lora_alpha": 6, "r": 4}, 3.0),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not LORA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base's weights"),
        ({"r": 3}, "do not fit"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_pefts_settings_are_read_or_refused(outputs, changes, result):
    base = publish_base(outputs)
    export(publish_adapters(outputs, base), "peft")
    config = json.loads(Path("out", CONFIG).read_text())
    Path("out", CONFIG).write_text(json.dumps({**config, **changes}))
    if isinstance(result, float):
        made = json.loads((import_from("out", base) / CONFIG).read_text())
        assert made["lora_parameters"]["scale"] == result
    else:
        with pytest.raises(DataError, match=result):
            import_from("out", base)
