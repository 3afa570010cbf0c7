"""Reads and writes files of torch.save without torch and pickle.

A .pt file is a zip archive whose data.pkl describes the tensors beside it. Reading returns each tensor's place, and
`pieces` reads its numbers a few megabytes at a time. Places and sizes are checked first: members must not be
compressed, overlapping or duplicate, and lists have limits.
Written pickles use few opcodes and name only OrderedDict, _rebuild_tensor_v2, storage types and tiktoken's Encoding, so
that PyTorch's safe loader (`weights_only=True`) reads them.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlxchat.data.pickled import Made, read_pickle
from mlxchat.errors import DataError
from mlxchat.interop.tensors import AGAIN, DTYPES, FLOATS, MOST_DIMENSIONS, Array, Dtype, Entry, TensorFile, bytes_of

_END, _END64, _LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_ENTRY, _LOCAL = b"PK\1\2", b"PK\3\4"
_MOST_DIRECTORY_BYTES = 16 << 20
_LONGEST_COMMENT = 1 << 16
# Beginning of torch.save's files before 2020: a pickled number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True)
class Member:
    """A member of the archive."""

    name: str
    start: int
    """Offset of its content in bytes."""
    bytes: int
    crc: int
    """CRC-32 of the content; 0: none."""


def list_members(file: BinaryIO, where: str) -> dict[str, Member]:
    """Return the members of a torch file by name, without their common folder.

    Raises:
        DataError: it is not such an archive, or it is damaged or malicious.
    """
    size = file.seek(0, 2)
    _check_beginning(file, where)
    count, start, length = _directory(file, size, where)
    if length > _MOST_DIRECTORY_BYTES or start + length > size:
        raise DataError(f"{where} is damaged: its directory extends beyond its end. {AGAIN}")
    file.seek(start)
    listing = file.read(length)
    found: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        if listing[at : at + 4] != _ENTRY or len(listing) < at + 46:
            raise DataError(f"{where} is damaged: its directory is incomplete. {AGAIN}")
        flags, method, crc, packed, plain, names, extra, comment, header = struct.unpack(
            "<HH4xIIIHHH8xI", listing[at + 8 : at + 46]
        )
        raw = listing[at + 46 : at + 46 + names]
        fields = listing[at + 46 + names : at + 46 + names + extra]
        at += 46 + names + extra + comment
        name = raw.decode("utf-8", "replace")
        plain, packed, header = _wide(fields, plain, packed, header, where)
        if flags & 1 or method != 0 or packed != plain:
            raise DataError(
                f"{where} cannot be read: {name} is compressed or encrypted, which torch.save never does. Save it again"
            )
        if name in found:
            raise DataError(f"{where} cannot be read: it has {name} twice, which torch.save never does")
        found[name] = Member(name, _content_start(file, header, raw, start, plain, where), plain, crc)
    _check_overlaps(list(found.values()), where)
    return _without_folder(found, where)


def _check_beginning(file: BinaryIO, where: str) -> None:
    file.seek(0)
    beginning = file.read(512)
    if beginning[:4] in (_LOCAL, _END):
        return
    if beginning.startswith(b"version https://git-lfs"):
        reason = "is a Git LFS pointer. Download the file with: git lfs pull"
    elif beginning.startswith(_LEGACY) or beginning[257:262] == b"ustar":
        reason = (
            "is in torch.save's format before 2020 (not a zip archive). Convert it with torch: "
            "torch.save(torch.load(OLD, weights_only=True), NEW)"
        )
    elif not beginning:
        reason = f"is empty. {AGAIN}"
    else:
        reason = f"is not a file of torch.save: expected a zip archive. {AGAIN}"
    raise DataError(f"{where} {reason}")


def _directory(file: BinaryIO, size: int, where: str) -> tuple[int, int, int]:
    """Return the number of members, and the offset and length of the directory."""
    tail_start = max(0, size - _LONGEST_COMMENT - 22)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + 22:
        raise DataError(f"{where} is truncated: it has {size:,} bytes without the end of the archive. {AGAIN}")
    count, length, start = struct.unpack("<HII", tail[at + 10 : at + 20])
    locator = tail[at - 20 : at] if at >= 20 else b""
    if locator[:4] == _LOCATOR64:
        (place,) = struct.unpack("<Q", locator[8:16])
        if place + 56 > size:
            raise DataError(f"{where} is damaged: its end record is outside the file. {AGAIN}")
        file.seek(place)
        record = file.read(56)
        if record[:4] != _END64:
            raise DataError(f"{where} is damaged: its end record is missing. {AGAIN}")
        count, length, start = struct.unpack("<QQQ", record[32:56])
    return count, start, length


def _wide(fields: bytes, plain: int, packed: int, header: int, where: str) -> tuple[int, int, int]:
    """Return the three numbers; those above 32 bits are read from the extra field (zip64)."""
    wanted = [index for index, value in enumerate((plain, packed, header)) if value == 0xFFFFFFFF]
    values = [plain, packed, header]
    at = 0
    while wanted and at + 4 <= len(fields):
        tag, length = struct.unpack("<HH", fields[at : at + 4])
        if tag == 1 and length >= 8 * len(wanted) and at + 4 + length <= len(fields):
            for place, index in enumerate(wanted):
                (values[index],) = struct.unpack("<Q", fields[at + 4 + 8 * place : at + 12 + 8 * place])
            return values[0], values[1], values[2]
        at += 4 + length
    if wanted:
        raise DataError(f"{where} is damaged: a size is missing. {AGAIN}")
    return plain, packed, header


def _content_start(file: BinaryIO, header: int, raw: bytes, end: int, length: int, where: str) -> int:
    file.seek(min(header, end))
    local = file.read(30)
    if len(local) < 30 or local[:4] != _LOCAL:
        raise DataError(f"{where} is damaged: a member is not at its place. {AGAIN}")
    names, extra = struct.unpack("<HH", local[26:30])
    if file.read(names) != raw:
        raise DataError(f"{where} is damaged: a member has two names. {AGAIN}")
    start = int(header + 30 + names + extra)
    if start + length > end:
        raise DataError(f"{where} is truncated or damaged: a member is longer than the rest. {AGAIN}")
    return start


def _check_overlaps(members: list[Member], where: str) -> None:
    end = 0
    for member in sorted(members, key=lambda each: (each.start, each.bytes)):
        if member.start < end:
            raise DataError(f"{where} cannot be read: {member.name} overlaps another member")
        end = member.start + member.bytes


def _without_folder(members: dict[str, Member], where: str) -> dict[str, Member]:
    folders = {name.split("/", 1)[0] for name in members}
    if len(folders) != 1 or any("/" not in name for name in members):
        raise DataError(f"{where} is not a file of torch.save: its members are not in one folder")
    return {name.split("/", 1)[1]: member for name, member in members.items()}


_MOST_NUMBERS = 1 << 63
"""Offsets, lengths and strides are 64-bit signed integers in torch."""
_WHAT = "a file of torch.save"
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_STORAGES = {f"torch.{dtype.storage}": dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Storage:
    """A sequence of numbers in a member of the archive."""

    dtype: Dtype
    member: Member
    count: int


@dataclass(frozen=True)
class TorchTensor:
    """The place of a contiguous tensor."""

    storage: Storage
    first: int
    """Its offset in the storage, in numbers."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Dtype:
        """Type of its numbers."""
        return self.storage.dtype

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class TorchFile(TensorFile):
    """An open file of torch.save; `content` is the saved object, with a `TorchTensor` for each tensor."""

    def _open(self) -> None:
        self._checked: set[Member] = set()
        self._members = list_members(self._file, self.where)
        self.content = self._read_content()

    def tensors(self) -> dict[str, TorchTensor]:
        """Return the tensors of a state dict.

        Raises:
            DataError: the content is not a dictionary of tensors, or tensors share numbers.
        """
        content = self.content
        if not isinstance(content, dict) or not content:
            raise DataError(f"{self.where} is not a dictionary of tensors, as a model's file is")
        others = [
            str(key)[:80] for key, value in content.items() if type(key) is not str or type(value) is not TorchTensor
        ]
        if others:
            raise DataError(f"{self.where} has entries that are not tensors: {', '.join(others[:3])}")
        self._check_sharing(content)
        return dict(content)

    def pieces(self, tensor: TorchTensor) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
        """Yield a tensor's numbers in order, a few megabytes at a time, in the file's type (bfloat16 as 16 bits).

        Raises:
            DataError: the checksum differs.
        """
        member, width, crc = tensor.storage.member, tensor.dtype.bytes, 0
        whole = tensor.count == tensor.storage.count
        if not whole:
            self._check_sum(member)
        for data in self._blocks(member.start + tensor.first * width, tensor.count * width):
            crc = zlib.crc32(data, crc) if whole else crc
            yield np.frombuffer(data, tensor.dtype.numpy)
        if whole:
            self._compare(member, crc)

    def numbers(self, tensor: TorchTensor) -> np.ndarray[Any, np.dtype[Any]]:
        """Return all numbers of a small tensor, in its shape."""
        parts = list(self.pieces(tensor))
        return np.concatenate(parts or [np.zeros(0, tensor.dtype.numpy)]).reshape(tensor.shape)

    def _read_content(self) -> Any:
        pickle = self._members.get("data.pkl")
        if pickle is None:
            raise DataError(f"{self.where} is not a file of torch.save: it has no data.pkl")
        order = self._members.get("byteorder")
        if order is not None and self._bytes(order, 16) != b"little":
            raise DataError(f"{self.where} was saved on a big-endian machine, which is not supported")
        data = self._bytes(pickle, pickle.bytes)
        self._compare(pickle, zlib.crc32(data))
        content = read_pickle(data, where=self.where, what=_WHAT, calls=(_TENSOR, _PARAMETER), types=_STORAGES)
        try:
            return self._interpret(content)
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{self.where} is damaged ({error}). {AGAIN}") from None

    def _interpret(self, value: Any) -> Any:
        """Return a value of the pickle with checked places of tensors for their descriptions."""
        if isinstance(value, dict):
            return {name: self._interpret(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._interpret(each) for each in value]
        if isinstance(value, Made) and value.name == _PARAMETER:
            data, _grad, _hooks = value.arguments
            return self._interpret(data)
        if isinstance(value, Made) and value.name == _TENSOR:
            storage, first, shape, strides, *_ = value.arguments
            return self._tensor(self._storage(storage), first, shape, strides)
        return value

    def _storage(self, value: Any) -> Storage:
        (key,) = value.arguments if isinstance(value, Made) and not value.name else (None,)
        if type(key) is not tuple or len(key) != 5 or key[0] != "storage" or key[1] not in _STORAGES:
            raise DataError(f"{self.where} cannot be read: it refers to something that is no storage")
        _, kind, name, _device, count = key
        if type(name) is not str or type(count) is not int or not 0 <= count < _MOST_NUMBERS:
            raise DataError(f"{self.where} cannot be read: it refers to something that is no storage")
        dtype, member = _STORAGES[kind], self._members.get(f"data/{name}")
        if member is None:
            raise DataError(f"{self.where} is damaged: data/{name} is missing")
        if count * dtype.bytes != member.bytes:
            raise DataError(
                f"{self.where} is damaged: data/{name} has {member.bytes:,} bytes, not {count} {dtype.name}"
            )
        return Storage(dtype, member, count)

    def _tensor(self, storage: Storage, first: Any, shape: Any, strides: Any) -> TorchTensor:
        if type(shape) is not tuple or type(strides) is not tuple:
            raise DataError(f"{self.where} cannot be read: a tensor has an impossible place or shape")
        # Checked first, since the product of many or huge dimensions could exhaust memory.
        if max(len(shape), len(strides)) > MOST_DIMENSIONS:
            raise DataError(
                f"{self.where} cannot be read: a tensor has {max(len(shape), len(strides)):,} dimensions, expected at "
                f"most {MOST_DIMENSIONS}"
            )
        if not all(type(each) is int and 0 <= each < _MOST_NUMBERS for each in (first, *shape, *strides)):
            raise DataError(f"{self.where} cannot be read: a tensor has an impossible place or shape")
        # Only contiguous tensors: strides can make a small storage appear to have any number of elements.
        expected: list[int] = []
        step = 1
        for length in reversed(shape):
            expected.insert(0, step)
            step *= length
        plain = len(shape) == len(strides) and all(
            length == 1 or stride == wanted for length, stride, wanted in zip(shape, strides, expected, strict=True)
        )
        if not plain:
            raise DataError(f"{self.where} cannot be read: a tensor of shape {list(shape)} is not contiguous")
        if first + step > storage.count:
            raise DataError(
                f"{self.where} is damaged: a tensor of shape {list(shape)} needs {first + step:,} numbers, its storage "
                f"has {storage.count:,}"
            )
        # An empty tensor needs no storage, but its other dimensions must fit NumPy's 64 bits.
        if prod(length or 1 for length in shape) >= _MOST_NUMBERS // storage.dtype.bytes:
            raise DataError(f"{self.where} cannot be read: a tensor has the impossible shape {list(shape)}")
        return TorchTensor(storage, first, shape)

    def _check_sharing(self, tensors: dict[str, TorchTensor]) -> None:
        places = sorted(
            (tensor.storage.member.start, tensor.first, tensor.first + tensor.count, name)
            for name, tensor in tensors.items()
        )
        for (member, _, end, name), (other, first, _, second) in pairwise(places):
            if member == other and first < end:
                raise DataError(f"{self.where} cannot be read: {name} and {second} share their numbers")

    def _bytes(self, member: Member, most: int) -> bytes:
        self._file.seek(member.start)
        return self._file.read(min(member.bytes, most))

    def _check_sum(self, member: Member) -> None:
        """Check a member's checksum, once: it may contain 60,000 tensors."""
        if member in self._checked:
            return
        self._checked.add(member)
        crc = 0
        for data in self._blocks(member.start, member.bytes):
            crc = zlib.crc32(data, crc)
        self._compare(member, crc)

    def _compare(self, member: Member, crc: int) -> None:
        # torch can be configured not to compute checksums.
        if member.crc not in (0, crc):
            raise DataError(f"{self.where} is damaged: the checksum of {member.name} differs. {AGAIN}")


_NUMBERS_ALIGNMENT = 64

# The opcodes of written pickles (https://docs.python.org/3/library/pickletools.html).
_PROTO, _GLOBAL, _EMPTY_TUPLE, _REDUCE, _MARK, _STOP = b"\x80", b"c", b")", b"R", b"(", b"."
_TUPLE, _BINUNICODE, _BININT, _LONG, _BINPERSID, _FALSE = b"t", b"X", b"J", b"\x8a", b"Q", b"\x89"
_SETITEMS, _NEWOBJ, _BUILD, _EMPTY_DICT = b"u", b"\x81", b"b", b"}"
_BINBYTES, _SHORT_BINBYTES = b"B", b"C"


def write_state(path: Path, entries: Sequence[Entry], read: Callable[[str], Iterable[Array]]) -> None:
    """Write an ordered dict of tensors as `torch.save` does.

    Args:
        path: of the .pt file; its stem becomes the archive's top folder, as in PyTorch.
        entries: names, types (F32, BF16, F16) and shapes, in order.
        read: name → numbers in one or several arrays, BF16 as bits; called once for each entry, in order.
    """
    body = [_PROTO, b"\x02", _GLOBAL, b"collections\nOrderedDict\n", _EMPTY_TUPLE, _REDUCE, _MARK]
    for number, entry in enumerate(entries):
        body += [_text(entry.name), *_tensor(number, FLOATS[entry.code].storage, entry.shape)]
    _write_zip(path, b"".join([*body, _SETITEMS, _STOP]), [(entry.num_bytes, entry.name) for entry in entries], read)


def write_tensor(path: Path, values: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    """Write one tensor of int32 as `torch.save` does."""
    body = b"".join([_PROTO, b"\x02", *_tensor(0, "IntStorage", values.shape), _STOP])
    _write_zip(path, body, [(values.nbytes, "")], lambda name: [values])


def write_encoding(path: Path, pattern: str, ranks: Mapping[bytes, int], special_ids: Mapping[str, int]) -> None:
    """Write the tiktoken.Encoding that nanochat pickles as tokenizer.pkl."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    body = [_PROTO, b"\x03", _GLOBAL, b"tiktoken.core\nEncoding\n", _EMPTY_TUPLE, _NEWOBJ, _EMPTY_DICT, _MARK]
    body += [_text("name"), _text("rustbpe"), _text("pat_str"), _text(pattern)]
    body += [_text("mergeable_ranks"), _EMPTY_DICT, _MARK]
    body += [part for token, rank in ordered for part in (_bytes(token), _integer(rank))]
    body += [_SETITEMS, _text("special_tokens"), _EMPTY_DICT, _MARK]
    body += [part for name, id_ in special_ids.items() for part in (_text(name), _integer(id_))]
    path.write_bytes(b"".join([*body, _SETITEMS, _SETITEMS, _BUILD, _STOP]))


def _tensor(number: int, storage: str, shape: Sequence[int]) -> list[bytes]:
    """Return the call torch._utils._rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict())."""
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    count = prod(shape)
    return [
        _GLOBAL, b"torch._utils\n_rebuild_tensor_v2\n", _MARK,
        _MARK, _text("storage"), _GLOBAL, b"torch\n" + storage.encode() + b"\n", _text(str(number)),
        _text("cpu"), _integer(count), _TUPLE, _BINPERSID,
        _integer(0), _tuple(shape), _tuple(strides), _FALSE,
        _GLOBAL, b"collections\nOrderedDict\n", _EMPTY_TUPLE, _REDUCE, _TUPLE, _REDUCE,
    ]  # fmt: skip


def _tuple(numbers: Sequence[int]) -> bytes:
    return b"".join([_MARK, *map(_integer, numbers), _TUPLE])


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return _BININT + value.to_bytes(4, "little", signed=True)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return _LONG + bytes([len(content)]) + content


def _text(value: str) -> bytes:
    content = value.encode()
    return _BINUNICODE + len(content).to_bytes(4, "little") + content


def _bytes(value: bytes) -> bytes:
    if len(value) < 256:
        return _SHORT_BINBYTES + bytes([len(value)]) + value
    return _BINBYTES + len(value).to_bytes(4, "little") + value


def _write_zip(
    path: Path, pickled: bytes, storages: Sequence[tuple[int, str]], read: Callable[[str], Iterable[Array]]
) -> None:
    """Write an uncompressed zip with each member at a multiple of 64 bytes, so that it can be memory-mapped."""
    top = path.stem
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, num_bytes: int, content: Iterable[bytes | memoryview]) -> None:
            info = zipfile.ZipInfo(f"{top}/{name}")
            large = num_bytes >= zipfile.ZIP64_LIMIT
            # A local header has 30 bytes, the name, a large file's sizes (20), and this padding (PyTorch's field FB).
            filled = file.tell() + 30 + len(info.filename) + 20 * large + 4
            padding = -filled % _NUMBERS_ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w", force_zip64=large) as part:
                written = sum(part.write(piece) for piece in content)
            assert written == num_bytes, name

        add("data.pkl", len(pickled), [pickled])
        add("byteorder", 6, [b"little"])
        for number, (num_bytes, name) in enumerate(storages):
            add(f"data/{number}", num_bytes, map(bytes_of, read(name)))
        add("version", 2, [b"3\n"])
