"""Malicious files: no code is executed, and each is refused by name."""

import builtins
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


def refused(data: bytes, message: str | None = None) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_pickle(data, where="evil.pkl", what="a test's pickle", calls=["tiktoken.core.Encoding"])
    assert "evil.pkl" in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        Calls(os.system, "touch ran"),
        Calls(eval, "open('ran', 'w')"),
        Calls(exec, "open('ran', 'w')"),
        Calls(getattr, Calls(__import__, "os"), "system"),
        Calls(builtins.open, "ran", "w"),
        Calls(subprocess.Popen, ["touch", "ran"]),
        Calls(bytearray, 1 << 40),
    ],
    ids=["system", "eval", "exec", "getattr", "open", "popen", "bytearray"],
)
def test_no_function_is_called(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in range(2, 6):
        for content in (call, {"weights": [call]}, [call, 1]):
            refused(pickle.dumps(content, protocol), "which such a file does not need.*No code of it was executed")
    for protocol in (0, 1):
        refused(pickle.dumps(call, protocol))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R.",
        b"ctiktoken.core\nEncoding.__init__\n.",
        b"X\x01\x00\x00\x00a)R.",  # calls a text
        b"ccollections\nOrderedDict\n}X\x03\x00\x00\x00popNsb.",  # sets an attribute of a class
        b"ctiktoken.core\nEncoding\n}X\x04\x00\x00\x00nameNsb.",
        b"]}b.",
        b"\x82\x01.",  # an extension's number
        b"h\x05.",
        b"N",
        b"\xff.",
    ],
    ids=range(10),
)
def test_pickles_call_and_change_nothing(opcodes):
    refused(b"\x80\x04" + opcodes)


def test_described_objects_are_data():
    call = b"ctiktoken.core\nEncoding\n(K\x01tR}X\x09\x00\x00\x00argumentsNsb."
    made = read_pickle(b"\x80\x02" + call, where="", what="", calls=["tiktoken.core.Encoding"])
    assert (made.name, made.arguments, made.state) == ("tiktoken.core.Encoding", (1,), {"arguments": None})


def opening(path: Path) -> dict[str, Any]:
    return {name: tensor.read() for name, tensor in read_state(path).items()}


def test_models_and_tokenizers_execute_no_code(tmp_path, monkeypatch, lay):
    monkeypatch.chdir(tmp_path)
    path, model = tmp_path / "tokenizer.pkl", tmp_path / "model_000001.pt"
    path.write_bytes(pickle.dumps(Calls(os.system, "touch ran")))
    with pytest.raises(DataError, match=r"is not a tokenizer of nanochat's.*posix\.system"):
        load_vocabulary(str(path))
    lay.write_zip(model, {"data.pkl": pickle.dumps({"w": Calls(os.system, "touch ran")}, 2)})
    refuse_file(model, r"posix\.system.*No code of it was executed")
    assert {each.name for each in tmp_path.iterdir()} == {"tokenizer.pkl", "model_000001.pt"}


def refuse_file(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opening(path)
    assert path.name in str(caught.value)


NUMBERS = np.arange(24, dtype=np.float32).reshape(4, 6)


def test_tensors_may_share_a_storage(tmp_path, lay):
    def part(first: int, rows: int) -> Any:
        return lay.Tensor(NUMBERS, key="0", first=first, shape=(rows, 6), strides=(6, 1))

    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"a": part(0, 1), "b": part(6, 3)})
    found = opening(path)
    assert np.array_equal(found["a"], NUMBERS[:1])
    assert np.array_equal(found["b"], NUMBERS[1:])


@pytest.mark.parametrize("beginning", [b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"<!DOCTYPE html>", b""])
def test_other_formats_are_refused(beginning, tmp_path):
    path = tmp_path / "model_000001.pt"
    path.write_bytes(beginning)
    refuse_file(path, r"not a zip archive.*To convert older files: torch\.save")
