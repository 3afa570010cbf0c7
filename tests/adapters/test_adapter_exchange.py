"""Exchange of adapters with mlx-lm and PEFT: imports, exports, equal logits."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapters.published import publish_adapters
from kit.artifacts import publish_base, some_ids
from kit.commands import run_here
from mlxchat.errors import DataError
from mlxchat.interop.names import hf_from_ours
from mlxchat.interop.peft import find_files, import_adapter
from mlxchat.interop.source import open_folder
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.parameters import flatten_parameters
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

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


def logits(model: Any) -> np.ndarray[Any, Any]:
    return np.asarray(model(some_ids()))


def our_logits(folder: Path) -> np.ndarray[Any, Any]:
    return logits(load_checkpoint(folder)[0])


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.asarray(value) for name, value in flatten_parameters(load_checkpoint(folder)[0]).items()}


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
    np.testing.assert_allclose(our_logits(made), logits(theirs), atol=1e-3)


@pytest.mark.parametrize(("architecture", "kind"), [("oct2025", "lora"), ("jul2026", "dora")])
def test_mlx_lm_opens_and_fuses_our_adapters(mlx_lm, outputs, monkeypatch, architecture, kind):
    from mlx_lm.fuse import main as fuse

    base = publish_base(outputs, architecture=architecture)
    tuned = publish_adapters(outputs, base, kind=kind)
    trust = architecture == "jul2026"
    ours = our_logits(tuned)
    assert np.abs(our_logits(base) - ours).max() > 1
    export(tuned, "mlx-adapter", "own")
    for folder in (tuned, Path("own")):
        theirs, _ = mlx_lm.load(str(base), adapter_path=str(folder), trust_remote_code=trust)
        np.testing.assert_allclose(logits(theirs), ours, atol=1e-3)
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
    below, expected, changed = weights(base), weights(tuned), 0
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
