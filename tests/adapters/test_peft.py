"""Exchange of adapters with PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from kit.artifacts import publish_adapters, publish_base, some_ids
from kit.commands import Command
from mlxchat.errors import DataError
from mlxchat.interop.names import hf_from_ours
from mlxchat.interop.peft import find_files, import_adapter
from mlxchat.interop.source import open_folder
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.gpt import GPT, flatten_parameters
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


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


def logits(model: GPT) -> np.ndarray[Any, Any]:
    return np.asarray(model.logits(model.hidden(mx.array(some_ids()))))


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.asarray(value) for name, value in flatten_parameters(load_checkpoint(folder)[0]).items()}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_exported_files_give_our_weights_by_pefts_formula(outputs: Path, command: Command, kind: str) -> None:
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


def test_peft_round_trip_is_bit_exact(outputs: Path, command: Command) -> None:
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


def test_rank_stabilised_lora_has_another_scale(exported: Path) -> None:
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
def test_unsupported_settings_are_refused(exported: Path, changes: dict[str, Any], message: str) -> None:
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
def test_adapters_unsupported_by_peft_are_not_exported(
    outputs: Path, command: Command, architecture: str, bits: int | None, message: str
) -> None:
    tuned = publish_adapters(outputs, publish_base(outputs, architecture=architecture), bits=bits)
    code, printed = command("export", tuned.name, "--to", "peft", "out")
    assert code == 2
    assert message in printed
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_gives_our_logits_and_its_adapters_are_imported(
    outputs: Path, tmp_path: Path, command: Command, kind: str
) -> None:
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
