"""Malicious files: no code is executed, and each is refused by name."""

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxchat.data.pickled import read_pickle
from mlxchat.data.tokenizer import load_vocabulary
from mlxchat.errors import DataError
from mlxchat.interop.torch_files import read_state


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


def test_described_objects_are_data():
    call = b"ctiktoken.core\nEncoding\n(K\x01tR}X\x09\x00\x00\x00argumentsNsb."
    made = read_pickle(b"\x80\x02" + call, where="", what="", calls=["tiktoken.core.Encoding"])
    assert (made.name, made.arguments, made.state) == ("tiktoken.core.Encoding", (1,), {"arguments": None})


def opening(path: Path) -> dict[str, Any]:
    return {name: tensor.read() for name, tensor in read_state(path).items()}


def test_models_and_tokenizers_execute_no_code(tmp_path, monkeypatch, lay):
    monkeypatch.chdir(tmp_path)
    path, model = tmp_path / "tokenizer.pkl", tmp_path / "model_000001.pt"
    path.write_bytes(pickle.dumps(CALLS["system"]))
    with pytest.raises(DataError, match=r"is not a tokenizer of nanochat's.*posix\.system"):
        load_vocabulary(str(path))
    lay.write_zip(model, {"data.pkl": pickle.dumps({"w": CALLS["system"]}, 2)})
    with pytest.raises(DataError, match=r"posix\.system.*No code of it was executed"):
        opening(model)
    assert {each.name for each in tmp_path.iterdir()} == {"tokenizer.pkl", "model_000001.pt"}


def test_tensors_may_share_a_storage(tmp_path, lay):
    numbers = np.arange(24, dtype=np.float32).reshape(4, 6)
    path = tmp_path / "model_000001.pt"
    parts = {"a": {"first": 0, "shape": (1, 6)}, "b": {"first": 6, "shape": (3, 6)}}
    lay.write_torch(path, {name: lay.Tensor(numbers, key="0", **lies) for name, lies in parts.items()})
    found = opening(path)
    assert np.array_equal(found["a"], numbers[:1])
    assert np.array_equal(found["b"], numbers[1:])


@pytest.mark.parametrize("beginning", [b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"<!DOCTYPE html>", b""])
def test_other_formats_are_refused(beginning, tmp_path):
    path = tmp_path / "model_000001.pt"
    path.write_bytes(beginning)
    with pytest.raises(DataError, match=r"model_000001\.pt.*not a zip archive.*To convert older files: torch\.save"):
        opening(path)
