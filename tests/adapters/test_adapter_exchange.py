"""Exchange of adapters with mlx-lm and PEFT: imports, exports, equal logits."""

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
from kit.commands import Command, run_here
from mlxchat.errors import DataError
from mlxchat.interop.names import hf_from_ours
from mlxchat.interop.peft import find_files, import_adapter
from mlxchat.interop.source import open_folder
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.gpt import flatten_parameters
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store


@pytest.fixture
def mlx_lm() -> Any:
    return pytest.importorskip("mlx_lm")


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
    mlx_lm, outputs, command, tmp_path, monkeypatch, architecture, kind
):
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


def test_imported_adapters_have_mlx_lms_logits(mlx_lm, outputs, command, tmp_path):
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


def test_bfloat16_is_widened(outputs, tmp_path):
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
def test_faulty_adapters_are_refused_before_writing(outputs, tmp_path, fault):
    base = publish_base(outputs)
    there, out = foreign(tmp_path / "there", publish_adapters(outputs, base)), tmp_path / "out"
    out.mkdir()
    break_it, reason = BROKEN[fault]
    break_it(there)
    source = open_folder(there)
    with pytest.raises(DataError, match=reason):
        import_adapter(source, find_files(source), base, out, chats=None, check=lambda: None)
    assert list(out.iterdir()) == []


def test_base_is_required_and_must_exist(outputs, command, tmp_path):
    foreign(tmp_path / "there", publish_adapters(outputs, publish_base(outputs)))
    for options, message in (([], "--base"), (["--base", "nothing"], '"nothing" is no artifact')):
        code, printed = command("import", "adapter", "there", *options)
        assert code == 2
        assert message in printed


@pytest.mark.parametrize(("architecture", "kind"), [("oct2025", "lora"), ("jul2026", "dora")])
def test_mlx_lm_opens_artifacts_with_our_logits(mlx_lm, tmp_path, architecture, kind):
    base = publish_base(tmp_path / "outputs", architecture=architecture)
    tuned = publish_adapters(tmp_path / "outputs", base, kind=kind)
    trust = architecture == "jul2026"
    theirs, _ = mlx_lm.load(str(base), adapter_path=str(tuned), trust_remote_code=trust)
    ours = logits(load_checkpoint(tuned)[0])
    np.testing.assert_allclose(logits(theirs), ours, atol=1e-3)
    assert np.abs(logits(load_checkpoint(base)[0]) - ours).max() > 1  # the adapters have an effect


def test_stacked_adapters_are_exported(mlx_lm, tmp_path):
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
def test_export_for_mlx_lm_fuses_the_adapters(mlx_lm, tmp_path, bits):
    tuned = publish_adapters(tmp_path / "outputs", publish_base(tmp_path / "outputs"), bits=bits)
    export(tuned, "mlx", tmp_path / "out")
    theirs, _ = mlx_lm.load(str(tmp_path / "out"))
    np.testing.assert_allclose(logits(theirs), logits(load_checkpoint(tuned)[0]), atol=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Its adapters were merged into the weights of" in card
    assert "sha256 of its adapters" in card


def test_export_for_nanochat_fuses_the_adapters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuned = publish_adapters(tmp_path / "outputs", publish_base(tmp_path / "outputs"), kind="dora")
    export(tuned, "nanochat", tmp_path / "out")
    run_here("import", "nanochat", "out", "--name", "back", f"outputs={tmp_path / 'outputs'}")
    back = load_checkpoint(resolve(Store(tmp_path / "outputs"), "import:back"))[0]
    # nanochat's tables are written in bfloat16 only if that is exact, and have no adapters.
    np.testing.assert_array_equal(logits(back), logits(load_checkpoint(tuned)[0]))


def test_model_without_adapters_has_no_adapter_export(tmp_path, capsys):
    base = publish_base(tmp_path / "outputs")
    assert run_here("export", base.name, "--to", "mlx-adapter", tmp_path / "out", f"outputs={base.parents[1]}") == 2
    assert "has no adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def export(artifact: Path, target: str, to: Path) -> None:
    assert run_here("export", artifact.name, "--to", target, to, f"outputs={artifact.parents[1]}") == 0


FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def import_peft(folder: str, base: Path) -> Path:
    """Import adapters on a base; return the checkpoint's folder."""
    made, source = Path("made"), open_folder(Path(folder))
    made.mkdir()
    import_adapter(source, find_files(source), base, made, chats=None, check=lambda: None)
    return made


@pytest.fixture
def exported(outputs: Path, command: Command) -> Path:
    """A base, whose adapters are exported to the folder out."""
    base = publish_base(outputs)
    command("export", publish_adapters(outputs, base).name, "--to", "peft", "out")
    return base


def logits(model: Any) -> np.ndarray[Any, Any]:
    return np.asarray(model(some_ids()))


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.asarray(value) for name, value in flatten_parameters(load_checkpoint(folder)[0]).items()}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_exported_files_give_our_weights_by_pefts_formula(outputs, command, kind):
    """W + alpha / r × B A; DoRA: rows rescaled to m (PEFT's `LoraLayer` in NumPy)."""
    base = publish_base(outputs)
    tuned = publish_adapters(outputs, base, kind=kind)
    code, printed = command("export", tuned.name, "--to", "peft", "out")
    assert code == 0, printed
    config, arrays = json.loads(Path("out", CONFIG).read_text()), load_file(Path("out", FILE))
    assert (config["peft_type"], config["use_dora"]) == ("LORA", kind == "dora")
    below, expected, changed = weights(base), weights(tuned), 0
    for name, weight in below.items():
        module = "base_model.model." + hf_from_ours(name).removesuffix(".weight")
        a, b = (arrays.pop(f"{module}.lora_{part}.weight", None) for part in "AB")
        if a is not None and b is not None:
            assert hf_from_ours(name).removesuffix(".weight") in config["target_modules"]
            weight = weight + config["lora_alpha"] / config["r"] * (b @ a)
            if (lengths := arrays.pop(f"{module}.lora_magnitude_vector", None)) is not None:
                weight = lengths[:, None] / np.linalg.norm(weight, axis=1, keepdims=True) * weight
            changed += 1
        np.testing.assert_allclose(weight, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert (changed > 0, arrays) == (True, {})


def test_peft_round_trip_is_bit_exact(outputs, command):
    base = publish_base(outputs)
    tuned = publish_adapters(outputs, base, kind="dora")
    command("export", tuned.name, "--to", "peft", "out")
    code, printed = command("import", "adapter", "out", "--base", base.name, "--name", "mine")
    assert code == 0, printed
    made = resolve(Store(outputs), "import:mine")
    there, here = load_file(made / "adapters.safetensors"), load_file(tuned / "adapters.safetensors")
    assert there.keys() == here.keys()
    assert all(np.array_equal(there[name], here[name]) for name in here)
    sizes = [json.loads((folder / CONFIG).read_text())["lora_parameters"] for folder in (made, tuned)]
    assert {**sizes[0], "keys": sorted(sizes[0]["keys"])} == {**sizes[1], "keys": sorted(sizes[1]["keys"])}


def test_rank_stabilised_lora_has_another_scale(exported):
    config = json.loads(Path("out", CONFIG).read_text())
    Path("out", CONFIG).write_text(json.dumps({**config, "use_rslora": True, "lora_alpha": 6, "r": 4}))
    made = import_peft("out", exported)
    assert json.loads((made / CONFIG).read_text())["lora_parameters"]["scale"] == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not LORA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base's weights"),
        ({"r": 0, "lora_alpha": None}, r"r 0 is not an integer above 0; lora_alpha None is not a number"),
        ({"r": 3}, "do not fit"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_unsupported_settings_are_refused(exported, changes, message):
    config = json.loads(Path("out", CONFIG).read_text())
    Path("out", CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(DataError, match=message):
        import_peft("out", exported)


@pytest.mark.parametrize(
    ("architecture", "bits", "message"),
    [
        ("jul2026", None, "NanoChatForCausalLM, nanochat's model of October 2025, does not support"),
        ("oct2025", 4, "quantised by MLX to 4 bits"),
    ],
)
def test_adapters_unsupported_by_peft_are_not_exported(outputs, command, architecture, bits, message):
    tuned = publish_adapters(outputs, publish_base(outputs, architecture=architecture), bits=bits)
    code, printed = command("export", tuned.name, "--to", "peft", "out")
    assert code == 2
    assert message in printed
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_gives_our_logits_and_its_adapters_are_imported(outputs, tmp_path, command, kind):
    torch = pytest.importorskip("torch")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = publish_base(outputs)
    tuned = publish_adapters(outputs, base, kind=kind)
    command("export", base.name, "--to", "hf", "base")
    command("export", tuned.name, "--to", "peft", "out")

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)

    ids = torch.tensor(some_ids())
    with torch.no_grad():
        there = peft.PeftModel.from_pretrained(load(), "out")(ids).logits.numpy()
    np.testing.assert_allclose(there, logits(load_checkpoint(tuned)[0]), atol=1e-3)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "fc2"], use_dora=kind == "dora", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load(), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
        expected = model(ids).logits.numpy()
    model.save_pretrained("theirs")
    code, printed = command("import", "adapter", "theirs", "--base", base.name, "--name", "theirs")
    assert code == 0, printed
    np.testing.assert_allclose(
        logits(load_checkpoint(resolve(Store(outputs), "import:theirs"))[0]), expected, atol=1e-3
    )


@pytest.mark.parametrize(("architecture", "kind"), [("oct2025", "lora"), ("jul2026", "dora")])
def test_mlx_lm_fuses_equal_weights(mlx_lm, tmp_path, monkeypatch, architecture, kind):
    from mlx_lm.fuse import main as fuse

    base = publish_base(tmp_path / "outputs", architecture=architecture)
    tuned = publish_adapters(tmp_path / "outputs", base, kind=kind)
    own, there = tmp_path / "own", tmp_path / "there"
    export(tuned, "mlx-adapter", own)
    trust = ["--trust-remote-code"] if architecture == "jul2026" else []
    command = ["fuse", "--model", str(base), "--adapter-path", str(own), "--save-path", str(there), *trust]
    monkeypatch.setattr(sys, "argv", command)
    fuse()
    export(tuned, "mlx", tmp_path / "fused")
    found, expected = load_file(there / "model.safetensors"), load_file(tmp_path / "fused" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
