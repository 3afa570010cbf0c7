"""Malicious files: no code is executed, and each is refused by name."""

import builtins
import contextlib
import json
import os
import pickle
import random
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxchat.data.pickled import read_pickle
from mlxchat.data.tokenizer import load_vocabulary
from mlxchat.errors import DataError
from mlxchat.interop.tensors import SafetensorsFile
from mlxchat.interop.torch_files import TorchFile


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
    with TorchFile(path) as file:
        tensors = file.tensors()
        return {name: file.numbers(tensor) for name, tensor in tensors.items()}


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


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"shape": (4, 7), "strides": (7, 1)}, "needs 28 numbers, its storage has 24"),
        ({"shape": (1 << 40, 1 << 40), "strides": (1 << 40, 1)}, "its storage has 24"),
        ({"first": 1}, "needs 25 numbers"),
        ({"first": -1}, "impossible place"),
        ({"shape": (-4, 6)}, "impossible place"),
        ({"shape": (1 << 30, 6), "strides": (0, 1)}, "is not contiguous"),
        ({"strides": (1, 1)}, "is not contiguous"),
        ({"strides": (1, 4)}, "is not contiguous"),
        ({"strides": (6,)}, "is not contiguous"),
        ({"count": 1 << 40}, "not 1099511627776 float32"),
        ({"count": 3}, "not 3 float32"),
        ({"shape": (2.0, 6)}, "impossible place"),
        ({"shape": (1,) * 50}, "has 50 dimensions"),
        ({"shape": (10**600, 6), "strides": (6, 1)}, "impossible place"),
        ({"shape": (1 << 62, 1 << 62, 0), "strides": (0, 0, 1)}, "impossible shape"),
        ({"count": 10**600}, "refers to something that is no storage"),
    ],
)  # fmt: skip
def test_false_sizes_and_strides_are_refused(lies, message, tmp_path, lay):
    path = tmp_path / "model_000001.pt"
    if "strides" not in lies and "shape" in lies:
        lies = {**lies, "strides": (6, 1) if len(lies["shape"]) == 2 else lies["shape"]}
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS, **lies)})
    refuse_file(path, message)


def test_safetensors_header_with_many_dimensions_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2**31 - 1] * 2_000, "data_offsets": [0, 4]}
    header = json.dumps({"w": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(DataError, match=r"w has 2,000 dimensions, expected at most 8"):
        SafetensorsFile(path)


def test_missing_and_duplicate_members_are_refused(tmp_path, lay):
    path, other = tmp_path / "model_000001.pt", tmp_path / "other.pt"
    lay.write_torch(other, {"w": lay.Tensor(NUMBERS)})
    with zipfile.ZipFile(other) as archive:
        lay.write_zip(path, {"data.pkl": archive.read("archive/data.pkl")})
    refuse_file(path, "data/0 is missing")
    with zipfile.ZipFile(other, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", b"\0" * NUMBERS.nbytes)
    refuse_file(other, "data/0 twice")


def test_tensors_of_one_storage_must_not_overlap(tmp_path, lay):
    def part(first: int, rows: int) -> Any:
        return lay.Tensor(NUMBERS, key="0", first=first, shape=(rows, 6), strides=(6, 1))

    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"a": part(0, 1), "b": part(6, 3)})
    found = opening(path)
    assert np.array_equal(found["a"], NUMBERS[:1])
    assert np.array_equal(found["b"], NUMBERS[1:])
    lay.write_torch(path, {"a": part(0, 2), "b": part(6, 3)})
    refuse_file(path, "a and b share their numbers")


def test_storage_of_many_tensors_is_read_at_most_twice(tmp_path, lay):
    """Guards against computing the checksum for each tensor: 2,400 in 18 MB read 43 GB."""
    path, numbers = tmp_path / "model_000001.pt", np.ones((500, 6), np.float32)
    lay.write_torch(path, {f"w{row}": lay.Tensor(numbers, key="0", first=6 * row, shape=(6,)) for row in range(500)})
    with TorchFile(path) as file:
        tensors = file.tensors()
        read = Counting(file._file)
        file._file = read  # type: ignore[assignment]
        assert all(np.array_equal(file.numbers(tensor), numbers[0]) for tensor in tensors.values())
    assert read.num_bytes <= 2 * numbers.nbytes


class Counting:
    def __init__(self, file: Any) -> None:
        self.file, self.num_bytes = file, 0

    def read(self, most: int) -> bytes:
        data: bytes = self.file.read(most)
        self.num_bytes += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_zip_bomb_is_not_unpacked(tmp_path, lay):
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(np.zeros(4 << 20, np.float32))}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    refuse_file(path, "is compressed or encrypted")


def test_overlapping_members_are_refused(tmp_path, lay):
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS)})
    data = path.read_bytes()
    # A second directory entry with another name for the same place.
    start = data.index(b"PK\1\2")
    entry = data[data.index(b"archive/data/0", start) - 46 : data.index(b"archive/data/0", start) + 14]
    local = struct.unpack("<I", entry[42:46])[0]
    second = entry.replace(b"data/0", b"data/9")
    end = bytearray(data[data.index(b"PK\5\6") :])
    count, length = struct.unpack("<HI", end[10:16])
    end[8:16] = struct.pack("<HHI", count + 1, count + 1, length + len(second))
    path.write_bytes(data[: data.index(b"PK\5\6")] + second + bytes(end))
    assert data[local : local + 4] == b"PK\3\4"
    refuse_file(path, "two names|overlaps another")


def test_damaged_directories_are_refused(tmp_path, lay):
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS)})
    whole = path.read_bytes()
    for place in (10, 12, 16):
        data = bytearray(whole)
        at = data.index(b"PK\5\6") + place
        data[at : at + 2] = b"\xff\xfe"
        path.write_bytes(bytes(data))
        refuse_file(path, "damaged|truncated|not a file of torch.save")
    for cut in (1, 30, 100, 300, 500, 700):
        path.write_bytes(whole[:-cut])
        refuse_file(path, "truncated|damaged")


def test_huge_directory_is_not_read(tmp_path, lay):
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS)})
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(size + (32 << 20))  # sparse
        file.seek(0, 2)
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 32 << 20, size, 0))
    refuse_file(path, "directory extends beyond its end")


@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", r"before 2020 \(not a zip archive\)\. Convert it with torch"),
        (b"\0" * 257 + b"ustar" + b"\0" * 250, "before 2020"),
        (b"<!DOCTYPE html>", "not a file of torch.save"),
        (b"\x80\x04N.", "not a file of torch.save"),
    ],
)  # fmt: skip
def test_other_formats_are_named(beginning, message, tmp_path):
    path = tmp_path / "model_000001.pt"
    path.write_bytes(beginning)
    refuse_file(path, message)


def test_fuzzed_files_are_read_or_refused(tmp_path, lay):
    path, draw = tmp_path / "model_000001.pt", random.Random(7)
    lay.write_torch(path, {"a": lay.Tensor(NUMBERS), "b": lay.Tensor(NUMBERS)})
    tokenizer = tmp_path / "tokenizer.pkl"
    tokenizer.write_bytes(pickle.dumps(lay.encoding_of()))
    for place, read in ((path, opening), (tokenizer, lambda place: load_vocabulary(str(place)))):
        whole = place.read_bytes()
        for _ in range(100):
            data = bytearray(whole)
            for _ in range(draw.choice((1, 2, 5))):
                at, length = draw.randrange(len(data)), draw.randrange(1, 9)
                data[at : at + draw.choice((0, 1, length))] = draw.randbytes(draw.choice((0, 1, length)))
            place.write_bytes(bytes(data))
            with contextlib.suppress(DataError):  # any other exception fails
                read(place)


def test_zip64_archives_are_read(tmp_path, lay):
    # zip64, as in archives above 4 GB.
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS)})
    data = path.read_bytes()
    end = data.index(b"PK\5\6")
    count, _, start = struct.unpack("<HII", data[end + 10 : end + 20])
    listing, at = b"", start
    for _ in range(count):
        names, extra = struct.unpack("<HH", data[at + 28 : at + 32])
        entry = bytearray(data[at : at + 46])
        wide = struct.pack("<HHQQ", 1, 16, *struct.unpack("<I", entry[24:28]), *struct.unpack("<I", entry[42:46]))
        entry[24:28] = entry[42:46] = b"\xff" * 4
        entry[30:32] = struct.pack("<H", len(wide))
        listing += bytes(entry) + data[at + 46 : at + 46 + names] + wide
        at += 46 + names + extra
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(listing), start)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, start + len(listing), 1)
    tail = b"PK\5\6" + b"\0\0\0\0" + b"\xff" * 12 + b"\0\0"
    path.write_bytes(data[:start] + listing + record + locator + tail)
    assert np.array_equal(opening(path)["w"], NUMBERS)
    path.write_bytes(data[:start] + listing.replace(b"\1\0\x10\0", b"\2\0\x10\0") + record + locator + tail)
    refuse_file(path, "a size is missing")
    for far in (1 << 40, 1 << 63, (1 << 64) - 1):
        path.write_bytes(data[:start] + listing[:-8] + struct.pack("<Q", far) + record + locator + tail)
        refuse_file(path, "a member is not at its place")
