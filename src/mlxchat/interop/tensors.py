"""Tensors of third-party files as NumPy arrays; reads and writes safetensors files.

Our checkpoints are float32. bfloat16, which NumPy lacks, is represented by its 16 bits, the upper half of a float32's.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from mlxchat.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

_ALIGNMENT = 8


@dataclass(frozen=True)
class Dtype:
    """A type of numbers."""

    name: str
    numpy: str
    """NumPy's type of the same width; for bfloat16 its 16 bits."""
    storage: str
    """PyTorch's name."""
    code: str = ""
    """safetensors' name, for types of models' parameters."""


DTYPES = (
    Dtype("float32", "<f4", "FloatStorage", "F32"),
    Dtype("bfloat16", "<u2", "BFloat16Storage", "BF16"),
    Dtype("float16", "<f2", "HalfStorage", "F16"),
    Dtype("int64", "<i8", "LongStorage"),
    Dtype("int32", "<i4", "IntStorage"),
)
FLOATS = {dtype.code: dtype for dtype in DTYPES if dtype.code}
"""safetensors' name → type of a model's parameters."""
_CODES = {dtype.numpy: dtype.code for dtype in FLOATS.values()} | {"<u4": "U32"}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    dtype: Dtype
    shape: tuple[int, ...]
    read: Callable[[], Array]
    """Return its numbers in the file's type (bfloat16 as 16 bits); raises DataError if they are damaged."""

    def floats(self) -> Floats:
        """Return its numbers as float32, exactly; it must be float32, bfloat16 or float16."""
        numbers = self.read()
        if self.dtype.name == "bfloat16":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.astype(np.float32, copy=False)


def check_pointer(path: Path, where: str) -> None:
    """Raise a DataError if a file cannot be read or is a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(23) == b"version https://git-lfs"
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    if is_pointer:
        raise DataError(f"{where} is a Git LFS pointer. Download the file with: git lfs pull")


def read_safetensors(path: Path, where: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name; their numbers stay in the file until they are read."""
    where = where or path.name
    check_pointer(path, where)
    try:
        with safe_open(path, "numpy"):  # checks that sizes fit the file and that no tensors overlap
            data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        entries = json.loads(data[8:start].tobytes())
    except Exception as error:  # the safetensors reader has several error types
        raise DataError(f"{where} is truncated or not a safetensors file ({error}). Copy it again.") from None
    entries.pop("__metadata__", None)
    if wrong := [name for name, entry in entries.items() if entry["dtype"] not in FLOATS]:
        raise DataError(
            f"{where}: {wrong[0]} is stored as {entries[wrong[0]]['dtype']}, expected {', '.join(FLOATS)}. Quantised "
            "models cannot be trained; import the original"
        )
    found = {}
    for name, entry in entries.items():
        dtype, (first, end) = FLOATS[entry["dtype"]], entry["data_offsets"]
        numbers = data[start + first : start + end].view(dtype.numpy).reshape(entry["shape"])
        found[name] = Tensor(dtype, numbers.shape, partial(np.asarray, numbers))
    return found


def as_stored(values: Floats, code: str) -> Array:
    """Return finite float32 numbers as F32, as F16, or as the bits of the nearest BF16 (ties to even)."""
    if code == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        return rounded.astype(np.uint16)
    return np.ascontiguousarray(values, dtype=np.float16 if code == "F16" else np.float32)


def fits(values: Floats, code: str) -> bool:
    """Return True if a type (F32, BF16 or F16) represents all numbers exactly."""
    bits = values.view(np.uint32)
    if code == "BF16":
        return not bool((bits & 0xFFFF).any())
    with np.errstate(over="ignore"):
        return code == "F32" or bool((values.astype(np.float16).astype(np.float32).view(np.uint32) == bits).all())


def write_safetensors(path: Path, arrays: Mapping[str, Array], *, made_for: str) -> None:
    """Write a safetensors file reproducibly, with arrays in their order; uint16 holds the bits of bfloat16.

    `made_for` is pt or mlx, which some readers require.
    """
    header: dict[str, Any] = {"__metadata__": {"format": made_for}}
    start = 0
    for name, array in arrays.items():
        end = start + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype.str], "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(bytes_of(array))


def bytes_of(values: Array) -> memoryview:
    """Return the bytes of an array, without a copy if it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
