"""Weights on their way out of a checkpoint: read and written a few megabytes at a time, however large the model is.

Our checkpoints hold float32 alone; elsewhere a
tensor may be bfloat16, which NumPy does not know: it travels as its bits, the upper half of a float32's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.errors import DataError
from mlxchat.interop.tensors import Floats, SafetensorsFile

Array = np.ndarray[Any, np.dtype[Any]]
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4}
_SAFETENSORS_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file that is to be written."""

    name: str
    dtype: str
    """F32, BF16, F16 or U32."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * _ITEM_BYTES[self.dtype]


class StoredWeights:
    """The tensors of a checkpoint artifact, by our names."""

    def __init__(self, folder: Path) -> None:
        """Look into model.safetensors.

        Raises:
            DataError: it is missing or damaged, or holds other numbers than float32.
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

    def fits(self, name: str, dtype: str) -> bool:
        """Tell whether a type (F32, BF16 or F16) has every number of a tensor."""
        return dtype == "F32" or all(_fits(piece, dtype) for piece in self.pieces(name))


def _fits(values: Floats, dtype: str) -> bool:
    bits = values.view(np.uint32)
    if dtype == "BF16":
        return not bool((bits & 0xFFFF).any())
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32).view(np.uint32) == bits).all())


def to_bfloat16(values: Floats) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return the bits of the nearest bfloat16, ties to even, of finite numbers."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return rounded.astype(np.uint16)


def as_stored(values: Floats, dtype: str) -> Array:
    """Return float32 numbers as F32 or F16, or as the bits of BF16."""
    if dtype == "BF16":
        return to_bfloat16(values)
    return np.ascontiguousarray(values, dtype=np.float16 if dtype == "F16" else np.float32)


def write_safetensors(
    path: Path, entries: list[Entry], read: Callable[[str], Iterable[Array]], *, made_for: str
) -> None:
    """Write a safetensors file.

    Args:
        path: of the file.
        entries: in the order in which their numbers are written.
        read: entries' names → the numbers, in one or several arrays; called once for each entry, in order.
        made_for: pt or mlx, which readers want to be told.
    """
    header: dict[str, Any] = {"__metadata__": {"format": made_for}}
    start = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, start + entry.num_bytes],
        }  # fmt: skip
        start += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _SAFETENSORS_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            written = sum(file.write(bytes_of(part)) for part in read(entry.name))
            assert written == entry.num_bytes, entry.name


def bytes_of(values: Array) -> memoryview:
    """Return the bytes of numbers in order, without a copy where they lie so."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
