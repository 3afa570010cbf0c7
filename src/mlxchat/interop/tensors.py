"""Safetensors files in pieces: read without loading them, written as `safetensors` itself would write them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np

from mlxchat.errors import DataError
from mlxchat.interop.torch_file import DTYPES, MOST_DIMENSIONS, Dtype

Numbers = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

_PIECE_BYTES = 4 << 20
_MOST_HEADER_BYTES = 32 << 20
_AGAIN = "Fetch or copy it again."
_KINDS = {"F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage"}
_DTYPES = {kind: DTYPES[storage] for kind, storage in _KINDS.items()}


class Tensor(Protocol):
    """What is known of a tensor in a file."""

    @property
    def dtype(self) -> Dtype:
        """Type of its numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


class TensorFile(Protocol):
    """A file of tensors that are read in pieces."""

    def pieces(self, tensor: Any) -> Iterator[Numbers]:
        """Yield a tensor's numbers in order, in its own type (bfloat16 as 16 bits)."""


@dataclass(frozen=True)
class SafeTensor:
    """Where a tensor lies in a safetensors file."""

    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    """In bytes, from the beginning of the file."""


class SafetensorsFile:
    """An open safetensors file."""

    def __init__(self, path: Path) -> None:
        """Open it and read what it lists.

        Raises:
            DataError: it is none, or what it lists does not fit the file.
        """
        self.where = path.name
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
        try:
            self.tensors = self._read_listing()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        """Return the open file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._file.close()

    def pieces(self, tensor: SafeTensor) -> Iterator[Numbers]:
        """Yield a tensor's numbers in order, a few megabytes at a time, in its own type (bfloat16 as 16 bits)."""
        left, place = prod(tensor.shape) * tensor.dtype.bytes, tensor.start
        while left:
            self._file.seek(place)
            data = self._file.read(min(left, _PIECE_BYTES))
            if not data:
                raise DataError(f"{self.where} became shorter while it was read")
            left, place = left - len(data), place + len(data)
            yield np.frombuffer(data, tensor.dtype.numpy)

    def _read_listing(self) -> dict[str, SafeTensor]:
        size = self._file.seek(0, 2)
        self._file.seek(0)
        head = self._file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if head.startswith(b"version "):
            raise DataError(f"{self.where} is a pointer of Git LFS, not the file itself. Get that with: git lfs pull")
        if 8 + length > size or length > _MOST_HEADER_BYTES:
            raise DataError(f"{self.where} is cut off, or no safetensors file. {_AGAIN}")
        try:
            listing = json.loads(self._file.read(length))
            entries = {name: entry for name, entry in listing.items() if name != "__metadata__"}
            found = {name: self._entry(name, entry, 8 + length, size) for name, entry in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{self.where} is no safetensors file that can be read ({error}). {_AGAIN}") from None
        ends = sorted((each.start, each.start + prod(each.shape) * each.dtype.bytes) for each in found.values())
        if any(second[0] < first[1] for first, second in pairwise(ends)):
            raise DataError(f"{self.where} cannot be read: its tensors lie over each other")
        return found

    def _entry(self, name: str, entry: Any, base: int, size: int) -> SafeTensor:
        kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if kind not in _DTYPES:
            raise DataError(
                f"{self.where}: {name} is stored as {kind}, expected {', '.join(_DTYPES)}. A quantised model cannot be "
                "trained; import the one that it was made from"
            )
        if len(shape) > MOST_DIMENSIONS:  # before any arithmetic: a product of very many dimensions takes hours
            raise DataError(
                f"{self.where} cannot be read: {name} has {len(shape):,} dimensions, at most {MOST_DIMENSIONS} are "
                "accepted"
            )
        numbers = (start, end, *shape)
        if any(type(each) is not int or each < 0 for each in numbers) or base + end > size:
            raise DataError(f"{self.where} is cut off or damaged: {name} lies outside of it. {_AGAIN}")
        if end - start != prod(shape) * _DTYPES[kind].bytes:
            raise DataError(f"{self.where} is damaged: {name} has {end - start:,} bytes, not {list(shape)} {kind}")
        return SafeTensor(_DTYPES[kind], shape, base + start)


def widen(numbers: Numbers, dtype: Dtype) -> Floats:
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


def write_float32(path: Path, tensors: Mapping[str, tuple[TensorFile, Tensor]]) -> None:
    """Write tensors as float32 to a safetensors file, a few megabytes at a time; the bytes depend on them alone.

    Args:
        path: the file.
        tensors: name → where it is read from.
    """
    names = sorted(tensors)  # as safetensors sorts tensors of one type
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name in names:
        _, tensor = tensors[name]
        start, end = end, end + 4 * prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            source, tensor = tensors[name]
            for numbers in source.pieces(tensor):
                file.write(widen(numbers, tensor.dtype).data)
