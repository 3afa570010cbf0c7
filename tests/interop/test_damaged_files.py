"""Hostile, damaged and foreign files: no code is executed, and each is refused by name."""

import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interop.twins import Tensor, encoding_of, write_torch, write_zip
from mlxchat.data.tokenizer import load_vocabulary
from mlxchat.data.vocabulary import read_pickle
from mlxchat.errors import DataError
from mlxchat.interop.importing import import_model
from mlxchat.interop.names import sizes_from_nanochat
from mlxchat.interop.torch_files import read_state

Spoil = Callable[[Path], Any]


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


CALLS = {
    "system": Calls(os.system, "touch ran"), "eval": Calls(eval, "open('ran', 'w')"),
    "exec": Calls(exec, "open('ran', 'w')"), "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
    "popen": Calls(subprocess.Popen, ["touch", "ran"]), "bytearray": Calls(bytearray, 1 << 40),
}  # fmt: skip
HOSTILE = {
    **{f"{name} in protocol {protocol}": pickle.dumps({"weights": [call]}, protocol)
       for name, call in CALLS.items() for protocol in (0, 2, 5)},
    "a method of an allowed class": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R.",
    "a call of a text": b"\x80\x04X\x01\x00\x00\x00a)R.",
    "an attribute of a class": b"\x80\x04ccollections\nOrderedDict\n}X\x03\x00\x00\x00popNsb.",
    "an extension's number": b"\x80\x04\x82\x01.",
    "an unknown opcode": b"\x80\x04\xff.",
    "no end": b"\x80\x04N",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_pickles_execute_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"evil\.pkl"):
        read_pickle(HOSTILE[name], where="evil.pkl", what="a test's pickle", calls=["tiktoken.core.Encoding"])
    assert list(tmp_path.iterdir()) == []


def test_models_and_tokenizers_execute_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, model = tmp_path / "tokenizer.pkl", tmp_path / "model_000001.pt"
    path.write_bytes(pickle.dumps(CALLS["system"]))
    with pytest.raises(DataError, match=r"is not a tokenizer of nanochat's.*posix\.system"):
        load_vocabulary(str(path))
    write_zip(model, {"data.pkl": pickle.dumps({"w": CALLS["system"]}, 2)})
    with pytest.raises(DataError, match=r"posix\.system.*No code of it was executed"):
        read_state(model)
    assert {each.name for each in tmp_path.iterdir()} == {"tokenizer.pkl", "model_000001.pt"}


def test_tensors_may_share_a_storage(tmp_path):
    numbers = np.arange(24, dtype=np.float32).reshape(4, 6)
    path = tmp_path / "model_000001.pt"
    parts = {"a": slice(0, 1), "b": slice(1, 4)}
    write_torch(path, {name: Tensor(numbers, storage="0", part=part) for name, part in parts.items()})
    found = {name: tensor.read() for name, tensor in read_state(path).items()}
    assert all(np.array_equal(found[name], numbers[part]) for name, part in parts.items())


def cut(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:at])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"archive/data/1") + 500] ^= 1
    path.write_bytes(bytes(data))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


MODEL, META, TOKENIZER, WEIGHTS = "model_000007.pt", "meta_000007.json", "tokenizer.pkl", "model.safetensors"
# What happens to a folder, and what the refusal says.
NANOCHAT: dict[str, tuple[Spoil, str]] = {
    "no tokenizer": (lambda at: (at / TOKENIZER).unlink(), r"has no tokenizer\.pkl"),
    "no meta": (lambda at: (at / META).unlink(), r"no meta_000007\.json"),
    "a short model": (lambda at: cut(at / MODEL, -1000), r"model_000007\.pt is truncated"),
    "a flipped bit": (lambda at: flip_bit(at / MODEL), r"model_000007\.pt is damaged"),
    "an LFS pointer": (lambda at: (at / MODEL).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs"),
    "an older format": (lambda at: (at / MODEL).write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."), "torch.save"),
    "an HTML page": (lambda at: (at / MODEL).write_bytes(b"<!DOCTYPE html>"), "not a zip archive"),
    "a short tokenizer": (lambda at: cut(at / TOKENIZER, -300), r"tokenizer\.pkl is damaged"),
    "another tokenizer": (lambda at: (at / TOKENIZER).write_bytes(pickle.dumps(encoding_of(30))), "of another"),
    "a short meta": (lambda at: cut(at / META, -5), r"meta_000007\.json is damaged"),
    "another meta": (
        lambda at: (at / META).write_text((at / META).read_text().replace('"n_layer": 2', '"n_layer": 1')),
        r"does not match meta_000007\.json",
    ),
    "nothing": (lambda at: [path.unlink() for path in at.iterdir()], "has no nanochat checkpoint"),
}
HF: dict[str, tuple[Spoil, str]] = {
    "another architecture": (
        lambda at: change(at / "config.json", model_type="llama", architectures=["LlamaForCausalLM"]),
        "pipeline=outside",
    ),
    "other functions": (
        lambda at: change(at / "config.json", final_logit_softcapping=30.0, hidden_act="gelu"),
        r"hidden_act gelu \(expected relu2\), final_logit_softcapping 30.0",
    ),
    "a pickle": (lambda at: (at / WEIGHTS).rename(at / "pytorch_model.bin"), "is a pickle, which is not read"),
    "short weights": (lambda at: cut(at / WEIGHTS, -100), "model.safetensors is truncated"),
    "no tokenizer": (
        lambda at: [(at / name).unlink() for name in ("tokenizer.json", "ranks.tiktoken")],
        "has no tokenizer.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("form", "name"), [*(("nanochat", name) for name in NANOCHAT), *(("hf", name) for name in HF)])
def test_faulty_models_are_refused(twin, tmp_path, form, name):
    made, (spoil, message) = twin(), (NANOCHAT if form == "nanochat" else HF)[name]
    config, out = made.config(), tmp_path / "out"
    out.mkdir()
    if form == "hf":
        import_model(config, out, lambda: None)
        config = made.config(format="hf", folder=str(out))
    spoil(Path(config.folder))
    with pytest.raises(DataError, match=message):
        import_model(config, tmp_path / "again", lambda: None)


def test_versions_between_the_two_are_refused():
    meta = {"sequence_len": 256, "vocab_size": 1000, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 64}
    with pytest.raises(DataError, match="between October 2025 and July 2026"):
        sizes_from_nanochat(meta, ["resid_lambdas", "x0_lambdas"], "model_000001.pt")
