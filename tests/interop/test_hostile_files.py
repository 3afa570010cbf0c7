"""Files that were made to do harm: nothing of them runs, nothing grows, and each is refused with its name."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxchat.data.pickled import Made, Maker, OrderedNames, read_pickle
from mlxchat.data.tokenizer import Tokenizer, load_vocabulary
from mlxchat.data.vocabulary import Vocabulary, spell_ranks
from mlxchat.errors import DataError
from mlxchat.interop.nanochat import check_token_bytes
from mlxchat.interop.tensors import SafetensorsFile
from mlxchat.interop.torch_files import TorchFile

Lay = Any
_MOST_GROWTH_BYTES = 64 << 20


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def reading(data: bytes) -> Any:
    names = {("collections", "OrderedDict"): Maker(OrderedNames), ("tiktoken.core", "Encoding"): Maker(Made)}
    return read_pickle(data, names, where="evil.pkl", what="a test's pickle")


def refused(data: bytes, message: str | None = None, *, watched: bool = True) -> None:
    """See to it that a pickle is refused, and that little memory was used where that is watched, which takes time."""
    if watched:
        tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message) as told:
            reading(data)
        assert "evil.pkl" in str(told.value)
        assert not watched or tracemalloc.get_traced_memory()[1] < _MOST_GROWTH_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
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
def test_no_function_is_called(call: Calls, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (call, {"weights": [call]}, [call, 1]):
        refused(pickle.dumps(content, protocol), "which such a file does not need. No code of it was executed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_protocols_are_refused_too(protocol: int) -> None:
    refused(pickle.dumps(Calls(os.system, "false"), protocol))


def test_what_is_allowed_cannot_be_climbed_from() -> None:
    # collections.OrderedDict is a name that is known; its attributes are none.
    refused(b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R.", "OrderedDict.__init__")
    refused(b"\x80\x02ccollections\nOrderedDict\nq\x00(X\x01\x00\x00\x00ah\x00uR.")


def test_data_cannot_be_called_and_functions_take_no_state() -> None:
    refused(b"\x80\x02}(U.")
    refused(b"\x80\x02X\x01\x00\x00\x00a)R.", "calls something that is no function")
    refused(b"\x80\x02]}b.", "gives a state to something that has none")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
        b"\x80\x04B" + struct.pack("<I", 0xFFFFFFFF) + b"x.",
        b"\x80\x04\x8d" + struct.pack("<Q", (1 << 64) - 1) + b".",
        b"\x80\x04\x95" + b"\xff" * 8 + b"\x8c\xff.",
        b"\x80\x04\x8b" + struct.pack("<i", 0x7FFFFFFF) + b".",
    ],
    ids=["bytes8", "bytes", "text8", "frame", "long4"],
)
def test_lengths_that_lie_allocate_nothing(data: bytes) -> None:
    refused(data)


def test_memo_places_far_away_allocate_nothing() -> None:
    # Python's own unpickler makes room for all places up to this one: 32 GB.
    assert reading(b"\x80\x02Nr\xff\xff\xff\xff0."[:-2] + b".") is None
    refused(b"\x80\x02j\xff\xff\xff\xff.", "place 4294967295")
    refused(b"\x80\x02h\x05.", "nothing was remembered")
    refused(b"\x80\x02q\x00.", "remembers nothing")


def test_lists_of_lists_of_lists_stay_small() -> None:
    # Ten references to the list before, forty times over: 10^40 items for whoever walks through them.
    data = b"\x80\x02]q\x00"
    for level in range(40):
        data += b"](" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 9 + b"eq" + bytes([level + 1])
    refused(data + b".", "something left over")


def nested_tuples(levels: int) -> bytes:
    """Return the opcodes of a tuple with 10^levels items in a few bytes: ten references to the level below, each."""
    data = b"Nq\x00"
    for level in range(levels):
        data += b"(" + (b"h" + bytes([level])) * 10 + b"tq" + bytes([level + 1])
    return data


def test_messages_write_out_no_container(tmp_path: Path, lay: Lay) -> None:
    """A name or storage that was a tuple of tuples became text of gigabytes for the error message."""
    refused(b"\x80\x02" + nested_tuples(6) + b"h\x06\x93.", "asks for tuple.tuple")
    refused(b"\x80\x02)" + b"\x85" * 100_000 + b"N\x93.", "asks for tuple.None", watched=False)
    path = tmp_path / "model_000001.pt"
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nh\x06X\x03\0\0\0cpuK\x00tQ."
    lay.write_zip(path, {"data.pkl": b"\x80\x02" + nested_tuples(6) + storage})
    refuse_file(path, "data/tuple are not in it")


def test_deep_nesting_does_not_recurse() -> None:
    value = reading(b"\x80\x02N" + b"\x85" * 100_000 + b".")
    assert isinstance(value, tuple)
    # As a key of a dictionary it would be hashed level by level.
    refused(b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.", "key of type tuple", watched=False)
    refused(b"\x80\x02" + b"(" * 1_500_000 + b".", watched=False)


@pytest.mark.parametrize(
    "value", [b")" + b"\x85" * 100_000, b")" + b"q\x00h\x00\x86" * 60], ids=["deep", "shared, so 2^60 long"]
)
def test_items_of_an_argument_are_not_hashed(value: bytes) -> None:
    """collections.OrderedDict([(value, 1)]) hashed its keys: it ended the process, or never ended."""
    items = value + b"K\x01\x86\x85\x85q\x01"
    refused(b"\x80\x02" + items + b"ccollections\nOrderedDict\nh\x01R\x86.", "TypeError", watched=False)


def test_a_list_that_holds_itself_is_harmless() -> None:
    value = reading(b"\x80\x02]q\x00h\x00a.")
    assert value[0] is value


def test_endless_work_ends() -> None:
    refused(b"\x80\x02" + b"N" * 2_000_001 + b".", "operations", watched=False)
    refused(b"\x80\x02" + b"N" * (40 << 20) + b".", "bytes", watched=False)


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_pickle_that_is_cut_anywhere_is_told(cut: int) -> None:
    whole = pickle.dumps({"a": b"bytes", "b": [1, 2.5, None, True, -7], "c": ("text", 1 << 70)})
    assert reading(whole) == {"a": b"bytes", "b": [1, 2.5, None, True, -7], "c": ("text", 1 << 70)}
    refused(whole[: min(cut, len(whole) - 1)])


def test_a_tokenizer_file_runs_nothing_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(Calls(os.system, "touch ran")))
    with pytest.raises(DataError, match=r"tokenizer\.pkl is not a tokenizer of nanochat's.*posix\.system"):
        load_vocabulary(str(path))
    assert [each.name for each in tmp_path.iterdir()] == ["tokenizer.pkl"]


def test_a_token_of_many_bytes_is_refused() -> None:
    """One of 10,000 bytes kept an import for minutes, and each of them made an answer longer."""
    single = {bytes([byte]): byte for byte in range(256)}
    Vocabulary({**single, b" " * 1024: 256}, "")
    with pytest.raises(DataError, match="tokens of up to 10,000 bytes"):
        Vocabulary({**single, b"ab" * 5000: 256}, "")
    with pytest.raises(DataError, match="tokens of up to 2,000 bytes"):
        Vocabulary({**single, **{b"%2000d" % rank: rank for rank in range(256, 300)}}, "")


def test_an_artifact_with_a_token_of_many_bytes_is_refused(tmp_path: Path) -> None:
    """Only imports were bounded: of an artifact that others made, each such token made an answer longer by 8 MB."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"a" * (8 << 20): 256}
    (tmp_path / "ranks.tiktoken").write_text(spell_ranks(ranks))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="tokens of up to 8,388,608 bytes"):
        Tokenizer.load(tmp_path)


def opening(path: Path) -> dict[str, Any]:
    with TorchFile(path) as file:
        tensors = file.tensors()
        return {name: file.numbers(tensor) for name, tensor in tensors.items()}


def refuse_file(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as told:
        opening(path)
    assert path.name in str(told.value)


NUMBERS = np.arange(24, dtype=np.float32).reshape(4, 6)


def test_a_model_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lay: Lay) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model_000001.pt"
    lay.write_zip(path, {"data.pkl": pickle.dumps({"w": Calls(os.system, "touch ran")}, 2)})
    refuse_file(path, r"posix\.system.*No code of it was executed")
    assert [each.name for each in tmp_path.iterdir()] == ["model_000001.pt"]


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"shape": (4, 7), "strides": (7, 1)}, "needs 28 numbers, its storage has 24"),
        ({"shape": (1 << 40, 1 << 40), "strides": (1 << 40, 1)}, "its storage has 24"),
        ({"first": 1}, "needs 25 numbers"),
        ({"first": -1}, "impossible place"),
        ({"shape": (-4, 6)}, "impossible place"),
        ({"shape": (1 << 30, 6), "strides": (0, 1)}, "not stored row by row"),
        ({"strides": (1, 1)}, "not stored row by row"),
        ({"strides": (1, 4)}, "not stored row by row"),
        ({"strides": (6,)}, "not stored row by row"),
        ({"count": 1 << 40}, "not 1099511627776 float32"),
        ({"count": 3}, "not 3 float32"),
        ({"shape": (2.0, 6)}, "impossible place"),
        ({"shape": (1,) * 50}, "has 50 dimensions"),
        ({"shape": (10**600, 6), "strides": (6, 1)}, "impossible place"),
        ({"shape": (1 << 62, 1 << 62, 0), "strides": (0, 0, 1)}, "impossible shape"),
        ({"count": 10**600}, "refers to something that is no storage"),
    ],
)  # fmt: skip
def test_sizes_and_strides_that_lie_are_refused(lies: dict[str, Any], message: str, tmp_path: Path, lay: Lay) -> None:
    path = tmp_path / "model_000001.pt"
    if "strides" not in lies and "shape" in lies:
        lies = {**lies, "strides": (6, 1) if len(lies["shape"]) == 2 else lies["shape"]}
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS, **lies)})
    refuse_file(path, message)


def test_a_tensor_of_many_dimensions_takes_no_memory(tmp_path: Path, lay: Lay) -> None:
    # The dimensions were multiplied before they were counted: 0.5 MB of them took 20 GB.
    path = tmp_path / "model_000001.pt"
    many = (2**31 - 1,) * 2_000  # 8 MB of partial products; 100,000 took 20 GB
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS, shape=many, strides=many)})
    tracemalloc.start()
    try:
        refuse_file(path, "has 2,000 dimensions")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_safetensors_header_of_many_dimensions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2**31 - 1] * 2_000, "data_offsets": [0, 4]}
    header = json.dumps({"w": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(DataError, match=r"w has 2,000 dimensions, at most 8"):
        SafetensorsFile(path)


def test_a_tensor_may_be_a_part_of_a_storage_but_none_may_share_numbers(tmp_path: Path, lay: Lay) -> None:
    def part(first: int, rows: int) -> Any:
        return lay.Tensor(NUMBERS, key="0", first=first, shape=(rows, 6), strides=(6, 1))

    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"a": part(0, 1), "b": part(6, 3)})
    found = opening(path)
    assert np.array_equal(found["a"], NUMBERS[:1])
    assert np.array_equal(found["b"], NUMBERS[1:])
    lay.write_torch(path, {"a": part(0, 2), "b": part(6, 3)})
    refuse_file(path, "a and b share their numbers")


def test_a_storage_of_many_tensors_is_read_twice_at_most(tmp_path: Path, lay: Lay) -> None:
    """Its checksum was computed anew for each tensor: 18 MB with 2,400 of them were 43 GB."""
    path, numbers = tmp_path / "model_000001.pt", np.ones((500, 6), np.float32)
    lay.write_torch(path, {f"w{row}": lay.Tensor(numbers, key="0", first=6 * row, shape=(6,)) for row in range(500)})
    with TorchFile(path) as file:
        tensors = file.tensors()
        read = Counting(file._file)
        file._file = read  # type: ignore[assignment]
        assert all(np.array_equal(file.numbers(tensor), numbers[0]) for tensor in tensors.values())
    assert read.num_bytes <= 2 * numbers.nbytes


class Counting:
    """A file that counts the bytes that are read."""

    def __init__(self, file: Any) -> None:
        self.file, self.num_bytes = file, 0

    def read(self, most: int) -> bytes:
        data: bytes = self.file.read(most)
        self.num_bytes += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_token_bytes_of_another_length_are_not_read(tmp_path: Path, lay: Lay, tokenizer: Tokenizer) -> None:
    """They were read whole, four times as large as the file, before their number was compared."""
    path = tmp_path / "token_bytes.pt"
    lay.write_torch(path, lay.Tensor(np.zeros(8 << 20, np.int32)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="8,388,608 tokens in the one"):
            check_token_bytes(path, tokenizer)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_member_that_is_not_there_is_told(tmp_path: Path, lay: Lay) -> None:
    path, other = tmp_path / "model_000001.pt", tmp_path / "other.pt"
    lay.write_torch(other, {"w": lay.Tensor(NUMBERS)})
    with zipfile.ZipFile(other) as archive:
        lay.write_zip(path, {"data.pkl": archive.read("archive/data.pkl")})
    refuse_file(path, "data/0 are not in it")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, lay: Lay) -> None:
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(np.zeros(4 << 20, np.float32))}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    refuse_file(path, "is compressed or encrypted")


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path, lay: Lay) -> None:
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", b"\0" * NUMBERS.nbytes)
    refuse_file(path, "twice")


def test_members_over_each_other_are_refused(tmp_path: Path, lay: Lay) -> None:
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS)})
    data = path.read_bytes()
    # A second entry of the list, of another name as long, for the same place.
    start = data.index(b"PK\1\2")
    entry = data[data.index(b"archive/data/0", start) - 46 : data.index(b"archive/data/0", start) + 14]
    local = struct.unpack("<I", entry[42:46])[0]
    second = entry.replace(b"data/0", b"data/9")
    end = bytearray(data[data.index(b"PK\5\6") :])
    count, length = struct.unpack("<HI", end[10:16])
    end[8:16] = struct.pack("<HHI", count + 1, count + 1, length + len(second))
    path.write_bytes(data[: data.index(b"PK\5\6")] + second + bytes(end))
    assert data[local : local + 4] == b"PK\3\4"
    refuse_file(path, "two names|lies over another")


@pytest.mark.parametrize("place", [8, 10, 12, 16])
def test_an_end_that_lies_is_told(place: int, tmp_path: Path, lay: Lay) -> None:
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS)})
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\5\6") + place
    data[at : at + 2] = b"\xff\xfe"
    path.write_bytes(bytes(data))
    if place == 8:  # the number on this disk, which nobody reads
        opening(path)
    else:
        refuse_file(path, "damaged|cut off|no file of torch.save's")


@pytest.mark.parametrize("cut", [1, 30, 100, 300, 500, 700])
def test_a_zip_that_is_cut_anywhere_is_told(cut: int, tmp_path: Path, lay: Lay) -> None:
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS)})
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    refuse_file(path, "cut off|damaged")


def test_a_directory_longer_than_any_of_torchs_is_not_read(tmp_path: Path, lay: Lay) -> None:
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS)})
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(size + (32 << 20))  # sparse
        file.seek(0, 2)
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 32 << 20, size, 0))
    refuse_file(path, "lies outside of it")


@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", r"before 2020 \(no zip archive\)\. Write it anew with torch"),
        (b"\0" * 257 + b"ustar" + b"\0" * 250, "before 2020"),
        (b"<!DOCTYPE html>", "no file of torch.save's"),
        (b"\x80\x04N.", "no file of torch.save's"),
    ],
)  # fmt: skip
def test_other_forms_of_files_are_told(beginning: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model_000001.pt"
    path.write_bytes(beginning)
    refuse_file(path, message)


def test_reading_needs_neither_torch_nor_pickle(tmp_path: Path, lay: Lay) -> None:
    path = tmp_path / "model_000001.pt"
    lay.write_torch(path, {"w": lay.Tensor(NUMBERS)})
    code = (
        "import sys\nfrom pathlib import Path\nfrom mlxchat.interop.torch_files import TorchFile\n"
        "before = set(sys.modules)\n"
        f"with TorchFile(Path({str(path)!r})) as file: print(file.numbers(file.tensors()['w']).sum())\n"
        "print(sorted({'torch', 'tiktoken'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "276.0\n[]\n"


def test_files_with_any_bytes_altered_are_read_or_refused(tmp_path: Path, lay: Lay) -> None:
    path, draw = tmp_path / "model_000001.pt", random.Random(7)
    lay.write_torch(path, {"a": lay.Tensor(NUMBERS), "b": lay.Tensor(NUMBERS)})
    tokenizer = tmp_path / "tokenizer.pkl"
    tokenizer.write_bytes(pickle.dumps(lay.encoding_of()))
    for place, read in ((path, opening), (tokenizer, lambda place: load_vocabulary(str(place)))):
        whole = place.read_bytes()
        for _ in range(250):
            data = bytearray(whole)
            for _ in range(draw.choice((1, 2, 5))):
                at, length = draw.randrange(len(data)), draw.randrange(1, 9)
                data[at : at + draw.choice((0, 1, length))] = draw.randbytes(draw.choice((0, 1, length)))
            place.write_bytes(bytes(data))
            with contextlib.suppress(DataError):  # all else would fail
                read(place)


def test_an_archive_with_places_of_64_bits_is_read(tmp_path: Path, lay: Lay) -> None:
    # As archives above 4 GB say where things are: d32's has 7.5.
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
        refuse_file(path, "a member is not where its list says")
