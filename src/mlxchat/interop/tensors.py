"""Reads and writes safetensors files in pieces of a few megabytes.

Our checkpoints are float32. bfloat16, which NumPy lacks, is represented by its 16 bits, the upper half of a float32's.
"""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import numpy as np

from mlxchat.errors import DataError
from mlxchat.model.sizes import GPTSizes

Array = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

MOST_DIMENSIONS = 8
"""Maximum dimensions of a tensor that is read."""
PIECE_BYTES = 4 << 20
AGAIN = "Copy it again."
_MOST_HEADER_BYTES = 32 << 20
_ALIGNMENT = 8


@dataclass(frozen=True)
class Dtype:
    """A type of numbers."""

    name: str
    bytes: int
    numpy: str
    """NumPy's type of the same width; for bfloat16 its 16 bits."""
    storage: str
    """PyTorch's name."""
    code: str = ""
    """safetensors' name, for types of models' parameters."""


DTYPES = (
    Dtype("float32", 4, "<f4", "FloatStorage", "F32"),
    Dtype("bfloat16", 2, "<u2", "BFloat16Storage", "BF16"),
    Dtype("float16", 2, "<f2", "HalfStorage", "F16"),
    Dtype("float64", 8, "<f8", "DoubleStorage"),
    Dtype("int64", 8, "<i8", "LongStorage"),
    Dtype("int32", 4, "<i4", "IntStorage"),
    Dtype("int16", 2, "<i2", "ShortStorage"),
    Dtype("int8", 1, "i1", "CharStorage"),
    Dtype("uint8", 1, "u1", "ByteStorage"),
    Dtype("bool", 1, "u1", "BoolStorage"),
)
FLOATS = {dtype.code: dtype for dtype in DTYPES if dtype.code}
"""safetensors' name → type of a model's parameters."""


class Tensor(Protocol):
    """A tensor in a file."""

    @property
    def dtype(self) -> Dtype:
        """Type of its numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


class TensorFile(ABC):
    """An open file whose tensors are read in pieces; a context manager, which closes it."""

    def __init__(self, path: Path, where: str | None = None) -> None:
        """Open a file and read everything except the tensors' numbers; `where` is its name in messages.

        Raises:
            DataError: it is missing, damaged or of another format.
        """
        self.where = where or path.name
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        """Return the open file."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self._file.close()

    @abstractmethod
    def _open(self) -> None:
        """Read the description of the tensors."""

    @abstractmethod
    def pieces(self, tensor: Any) -> Iterator[Array]:
        """Yield a tensor's numbers in order, a few megabytes at a time, in the file's type (bfloat16 as 16 bits)."""

    def _blocks(self, start: int, count: int) -> Iterator[bytes]:
        """Yield `count` bytes from `start` on, a few megabytes at a time."""
        while count:
            self._file.seek(start)
            data = self._file.read(min(count, PIECE_BYTES))
            if not data:
                raise DataError(f"{self.where} became shorter while it was read")
            start, count = start + len(data), count - len(data)
            yield data


@dataclass(frozen=True)
class SafeTensor:
    """The place of a tensor in a safetensors file."""

    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    """In bytes, from the beginning of the file."""


class SafetensorsFile(TensorFile):
    """An open safetensors file; `tensors` are the places of its tensors by name."""

    def _open(self) -> None:
        self.tensors = self._read_listing()

    def pieces(self, tensor: SafeTensor) -> Iterator[Array]:
        """Yield a tensor's numbers in order, a few megabytes at a time, in the file's type (bfloat16 as 16 bits)."""
        for data in self._blocks(tensor.start, prod(tensor.shape) * tensor.dtype.bytes):
            yield np.frombuffer(data, tensor.dtype.numpy)

    def _read_listing(self) -> dict[str, SafeTensor]:
        size = self._file.seek(0, 2)
        self._file.seek(0)
        head = self._file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if head.startswith(b"version "):
            raise DataError(f"{self.where} is a Git LFS pointer. Download the file with: git lfs pull")
        if 8 + length > size or length > _MOST_HEADER_BYTES:
            raise DataError(f"{self.where} is truncated or not a safetensors file. {AGAIN}")
        try:
            listing = json.loads(self._file.read(length))
            entries = {name: entry for name, entry in listing.items() if name != "__metadata__"}
            found = {name: self._entry(name, entry, 8 + length, size) for name, entry in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{self.where} is not a readable safetensors file ({error}). {AGAIN}") from None
        ends = sorted((each.start, each.start + prod(each.shape) * each.dtype.bytes) for each in found.values())
        if any(second[0] < first[1] for first, second in pairwise(ends)):
            raise DataError(f"{self.where} cannot be read: its tensors overlap")
        return found

    def _entry(self, name: str, entry: Any, base: int, size: int) -> SafeTensor:
        code, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if code not in FLOATS:
            raise DataError(
                f"{self.where}: {name} is stored as {code}, expected {', '.join(FLOATS)}. Quantised models cannot be "
                "trained; import the original"
            )
        if len(shape) > MOST_DIMENSIONS:  # checked first, since the product of very many dimensions takes hours
            raise DataError(
                f"{self.where} cannot be read: {name} has {len(shape):,} dimensions, expected at most {MOST_DIMENSIONS}"
            )
        numbers = (start, end, *shape)
        if any(type(each) is not int or each < 0 for each in numbers) or base + end > size:
            raise DataError(f"{self.where} is truncated or damaged: {name} extends beyond its end. {AGAIN}")
        if end - start != prod(shape) * FLOATS[code].bytes:
            raise DataError(f"{self.where} is damaged: {name} has {end - start:,} bytes, not {list(shape)} {code}")
        return SafeTensor(FLOATS[code], shape, base + start)


class StoredWeights:
    """The tensors of a checkpoint artifact, by our names."""

    def __init__(self, folder: Path) -> None:
        """Read the header of model.safetensors.

        Raises:
            DataError: it is missing, damaged or not float32.
        """
        self.path = folder / "model.safetensors"
        with SafetensorsFile(self.path) as file:
            self.shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
            wrong = [name for name, tensor in file.tensors.items() if tensor.dtype.name != "float32"]
        if wrong:
            raise DataError(f"{folder}: {wrong[0]} is not in float32, as our checkpoints are")

    def pieces(self, name: str) -> Iterator[Floats]:
        """Yield a tensor's numbers in order, a few megabytes at a time."""
        with SafetensorsFile(self.path) as file:
            yield from file.pieces(file.tensors[name])

    def __call__(self, name: str) -> Floats:
        """Return one tensor."""
        return np.concatenate([*self.pieces(name)]).reshape(self.shapes[name])

    def fits(self, name: str, code: str) -> bool:
        """Return True if a type (F32, BF16 or F16) represents a tensor exactly."""
        return code == "F32" or all(_fits(piece, code) for piece in self.pieces(name))


class AdaptedWeights(StoredWeights):
    """The tensors of a checkpoint with adapters, which are fused with the base's tensors when these are read."""

    def __init__(self, chain: list[Path], sizes: GPTSizes) -> None:
        """Read the headers of a chain of folders: of adapters, of their base, and so on; the last has all weights.

        Raises:
            DataError: a file is missing or damaged, or does not fit the model.
        """
        # Imported here, since only exports of adapters need MLX.
        from mlxchat.model.lora import read_adapters

        super().__init__(chain[-1])
        self._adapters = [read_adapters(folder, sizes) for folder in reversed(chain[:-1])]

    def pieces(self, name: str) -> Iterator[Floats]:
        """Yield a tensor's numbers in order; those of a tensor with adapters at once."""
        changing = [adapters for adapters in self._adapters if adapters.changes(name)]
        if not changing:
            yield from super().pieces(name)
            return
        import mlx.core as mx

        value = mx.array(np.concatenate([*super().pieces(name)]).reshape(self.shapes[name]))
        for adapters in changing:
            value = adapters.on(name, value)
        yield np.asarray(value).reshape(-1)


def _fits(values: Floats, code: str) -> bool:
    bits = values.view(np.uint32)
    if code == "BF16":
        return not bool((bits & 0xFFFF).any())
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32).view(np.uint32) == bits).all())


def widen(numbers: Array, dtype: Dtype) -> Floats:
    """Return numbers as float32, exactly.

    Args:
        numbers: as `pieces` yields them.
        dtype: float32, bfloat16 or float16.
    """
    if dtype.name == "bfloat16":
        wide = numbers.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return numbers.astype(np.float32, copy=False)


def as_stored(values: Floats, code: str) -> Array:
    """Return finite float32 numbers as F32, as F16, or as the bits of the nearest BF16 (ties to even)."""
    if code == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        return rounded.astype(np.uint16)
    return np.ascontiguousarray(values, dtype=np.float16 if code == "F16" else np.float32)


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    code: str
    """F32, BF16, F16 or U32."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its numbers in bytes."""
        return prod(self.shape) * (FLOATS[self.code].bytes if self.code in FLOATS else 4)


def write_safetensors(
    path: Path, entries: Sequence[Entry], read: Callable[[str], Iterable[Array]], *, made_for: str
) -> None:
    """Write a safetensors file reproducibly.

    Args:
        path: of the file.
        entries: in the order of their numbers in the file.
        read: name → numbers, in one or several arrays; called once for each entry, in order.
        made_for: pt or mlx, which some readers require.
    """
    header: dict[str, Any] = {"__metadata__": {"format": made_for}}
    start = 0
    for entry in entries:
        end = start + entry.num_bytes
        header[entry.name] = {"dtype": entry.code, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            written = sum(file.write(bytes_of(part)) for part in read(entry.name))
            assert written == entry.num_bytes, entry.name


def write_float32(path: Path, tensors: Mapping[str, tuple[TensorFile, Tensor]]) -> None:
    """Write tensors (name → file and tensor) as float32 to a safetensors file."""

    def read(name: str) -> Iterator[Array]:
        source, tensor = tensors[name]
        for numbers in source.pieces(tensor):
            yield widen(numbers, tensor.dtype)

    # Sorted, as by the safetensors library.
    write_safetensors(path, [Entry(name, "F32", tensors[name][1].shape) for name in sorted(tensors)], read,
                      made_for="mlx")  # fmt: skip


def bytes_of(values: Array) -> memoryview:
    """Return the bytes of an array, without a copy if it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
