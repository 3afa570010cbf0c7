"""Files of torch.save, read without torch: which tensors they hold, and their numbers in pieces.

Nothing is loaded as a whole: a tensor says where it lies, and `pieces` reads it a few megabytes at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from mlxchat.errors import DataError
from mlxchat.interop.pickled import MOST_BYTES, Maker, OrderedNames, brief, read_pickle
from mlxchat.interop.torch_zip import Member, list_members

_PIECE_BYTES = 4 << 20
MOST_DIMENSIONS = 8
"""Of a tensor of any format that is read."""
_MOST_NUMBERS = 1 << 63
"""Offsets, lengths and strides are 64-bit signed integers in torch."""
_WHAT = "a file of torch.save's"


@dataclass(frozen=True)
class Dtype:
    """A type of numbers."""

    name: str
    bytes: int
    numpy: str
    """NumPy's type of the same width; bfloat16, which it lacks, as the 16 bits."""


DTYPES = {
    "FloatStorage": Dtype("float32", 4, "<f4"),
    "BFloat16Storage": Dtype("bfloat16", 2, "<u2"),
    "HalfStorage": Dtype("float16", 2, "<f2"),
    "DoubleStorage": Dtype("float64", 8, "<f8"),
    "LongStorage": Dtype("int64", 8, "<i8"),
    "IntStorage": Dtype("int32", 4, "<i4"),
    "ShortStorage": Dtype("int16", 2, "<i2"),
    "CharStorage": Dtype("int8", 1, "i1"),
    "ByteStorage": Dtype("uint8", 1, "u1"),
    "BoolStorage": Dtype("bool", 1, "u1"),
}


@dataclass(frozen=True)
class Storage:
    """Numbers in a row, as a member of the archive."""

    dtype: Dtype
    member: Member
    count: int


@dataclass(frozen=True)
class TorchTensor:
    """Where a tensor lies, row after row without gaps."""

    storage: Storage
    first: int
    """Number of the storage with which it begins."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Dtype:
        """Type of its numbers."""
        return self.storage.dtype

    @property
    def count(self) -> int:
        """How many numbers."""
        return prod(self.shape)


class TorchFile:
    """An open file of torch.save's; `content` is what was saved, with a `TorchTensor` for each tensor."""

    def __init__(self, path: Path, where: str | None = None) -> None:
        """Open a file and read what it holds, but for the numbers.

        Raises:
            DataError: it is none, it is damaged, or it holds more than tensors and plain data.
        """
        self.path, self.where = path, where or path.name
        self._checked: set[Member] = set()
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
        try:
            self._members = list_members(self._file, self.where)
            self.content = self._read_content()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TorchFile:
        """Return the open file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._file.close()

    def tensors(self) -> dict[str, TorchTensor]:
        """Return the tensors of a file that holds a dictionary of them and nothing else (a state dict).

        Raises:
            DataError: it holds something else, or tensors that share numbers.
        """
        content = self.content
        if not isinstance(content, dict) or not content:
            raise DataError(f"{self.where} holds no dictionary of tensors, as a model's file does")
        others = [
            brief(key) for key, value in content.items() if type(key) is not str or type(value) is not TorchTensor
        ]
        if others:
            raise DataError(f"{self.where} holds more than tensors by name: {', '.join(others[:3])}")
        self._check_sharing(content)
        return dict(content)

    def pieces(self, tensor: TorchTensor) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
        """Yield the numbers of a tensor in order, a few megabytes at a time, in its own type (bfloat16 as 16 bits).

        Raises:
            DataError: what was read is not what the archive's checksum says.
        """
        member = tensor.storage.member
        whole = tensor.count == tensor.storage.count
        if not whole:
            self._check_sum(member)
        width = tensor.dtype.bytes
        self._file.seek(member.start + tensor.first * width)
        left, crc = tensor.count * width, 0
        while left:
            data = self._file.read(min(left, _PIECE_BYTES))
            if not data:
                raise DataError(f"{self.where} became shorter while it was read")
            left -= len(data)
            crc = zlib.crc32(data, crc) if whole else crc
            place = self._file.tell()
            yield np.frombuffer(data, tensor.dtype.numpy)
            self._file.seek(place)
        if whole:
            self._compare(member, crc)

    def numbers(self, tensor: TorchTensor) -> np.ndarray[Any, np.dtype[Any]]:
        """Return all numbers of a small tensor, in its shape."""
        parts = list(self.pieces(tensor))
        return np.concatenate(parts or [np.zeros(0, tensor.dtype.numpy)]).reshape(tensor.shape)

    def _read_content(self) -> Any:
        pickle = self._members.get("data.pkl")
        if pickle is None:
            raise DataError(f"{self.where} is no file of torch.save's: there is no data.pkl in it")
        if pickle.bytes > MOST_BYTES:
            raise DataError(f"{self.where} cannot be read: its data.pkl has {pickle.bytes:,} bytes")
        order = self._members.get("byteorder")
        if order is not None and self._bytes(order, 16) != b"little":
            raise DataError(f"{self.where} was saved on a big-endian machine, which is not read")
        names: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): Maker(OrderedNames),
            ("torch._utils", "_rebuild_tensor_v2"): Maker(self._rebuild),
            ("torch._utils", "_rebuild_parameter"): Maker(lambda data, grad, hooks: data),
            **{("torch", name): dtype for name, dtype in DTYPES.items()},
        }
        data = self._bytes(pickle, MOST_BYTES)
        self._compare(pickle, zlib.crc32(data))
        return read_pickle(data, names, where=self.where, what=_WHAT, persistent=self._storage)

    def _storage(self, key: Any) -> Storage:
        if type(key) is not tuple or len(key) != 5 or key[0] != "storage" or not isinstance(key[1], Dtype):
            raise DataError(f"{self.where} cannot be read: it refers to something that is no storage")
        _, dtype, name, _device, count = key
        if type(count) is not int or not 0 <= count < _MOST_NUMBERS:
            raise DataError(f"{self.where} cannot be read: it refers to something that is no storage")
        member = self._members.get(f"data/{name}") if type(name) is str else None
        if member is None:
            raise DataError(f"{self.where} is damaged: the numbers data/{brief(name)} are not in it")
        if count * dtype.bytes != member.bytes:
            raise DataError(
                f"{self.where} is damaged: data/{name} has {member.bytes:,} bytes, not {count} {dtype.name}"
            )
        return Storage(dtype, member, count)

    def _rebuild(self, storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
        if type(shape) is not tuple or type(strides) is not tuple or not isinstance(storage, Storage):
            raise DataError(f"{self.where} cannot be read: a tensor has an impossible place or shape")
        # Before any arithmetic: the product of many or of huge dimensions would itself fill memory.
        if max(len(shape), len(strides)) > MOST_DIMENSIONS:
            raise DataError(
                f"{self.where} cannot be read: a tensor has {max(len(shape), len(strides)):,} dimensions, at most "
                f"{MOST_DIMENSIONS} are accepted"
            )
        if not all(type(each) is int and 0 <= each < _MOST_NUMBERS for each in (first, *shape, *strides)):
            raise DataError(f"{self.where} cannot be read: a tensor has an impossible place or shape")
        # Only rows without gaps: strides can make a small storage look like any amount of numbers.
        expected: list[int] = []
        step = 1
        for length in reversed(shape):
            expected.insert(0, step)
            step *= length
        plain = len(shape) == len(strides) and all(
            length == 1 or stride == wanted for length, stride, wanted in zip(shape, strides, expected, strict=True)
        )
        if not plain:
            raise DataError(f"{self.where} cannot be read: a tensor of shape {list(shape)} is not stored row by row")
        if first + step > storage.count:
            raise DataError(
                f"{self.where} is damaged: a tensor of shape {list(shape)} needs {first + step:,} numbers, its storage "
                f"has {storage.count:,}"
            )
        # The sizes of an empty tensor, which needs no storage, still have to fit NumPy's 64 bits without the zeros.
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
        """Read a whole member, once: there may be 60,000 tensors in it."""
        if member in self._checked:
            return
        self._checked.add(member)
        self._file.seek(member.start)
        left, crc = member.bytes, 0
        while left and (data := self._file.read(min(left, _PIECE_BYTES))):
            left, crc = left - len(data), zlib.crc32(data, crc)
        self._compare(member, crc)

    def _compare(self, member: Member, crc: int) -> None:
        # torch can be told to compute none.
        if member.crc not in (0, crc):
            raise DataError(
                f"{self.where} is damaged: {member.name} is not what its checksum says. Fetch or copy it again."
            )
