"""Token sequences on disk: one safetensors file, written as a stream and read through the page cache.

offsets (n + 1,) int64: where each sequence begins, and the end of the last; ids (tokens,) uint16 or, for vocabularies
beyond 65,536, uint32; for conversations also trained (tokens,) bool.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlxchat.errors import DataError

FORMAT = 1
FILE = "tokens.safetensors"

Array = np.ndarray[Any, np.dtype[Any]]

# The header is written last, into space that is kept for it; the format allows spaces after the JSON.
_HEADER_BYTES = 512
_TYPES = {"I64": np.int64, "U16": np.uint16, "U32": np.uint32, "BOOL": np.bool_}


@dataclass(frozen=True)
class Tokens:
    """Sequences of token ids, by number."""

    offsets: Array
    """(n + 1,)"""
    flat: Array
    """(tokens,): the ids of all sequences, one after the other."""
    flat_trained: Array | None
    """(tokens,): whether a token is trained on; None: where the question does not arise."""

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.offsets) - 1

    def lengths(self, start: int, stop: int) -> list[int]:
        """Return the lengths in tokens of sequences start … stop − 1."""
        lengths: list[int] = np.diff(self.offsets[start : stop + 1]).tolist()
        return lengths

    def ids(self, index: int) -> Array:
        """Return the ids of a sequence, as a view of the file."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def trained(self, index: int) -> Array:
        """Return which tokens of a sequence are trained on, as a view of the file."""
        assert self.flat_trained is not None, "these sequences were written without"
        return self.flat_trained[self.offsets[index] : self.offsets[index + 1]]


def write_tokens(
    file: BinaryIO, sequences: Iterable[tuple[Array, Array | None]], *, count: int, vocab_size: int
) -> int:
    """Write sequences as they come; return how many tokens they have together.

    Args:
        file: empty, seekable.
        sequences: ids, and which of them are trained on: for all sequences, or None for all.
        count: number of sequences.
        vocab_size: decides the width of an id on disk.

    Raises:
        DataError: there are more or fewer than `count`.
    """
    width = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    offsets = np.zeros(count + 1, dtype=np.int64)
    masks: list[Array] = []
    file.seek(_HEADER_BYTES + offsets.nbytes)
    found = 0
    for ids, trained in sequences:
        if found < count:
            offsets[found + 1] = offsets[found] + len(ids)
        found += 1
        file.write(ids.astype(width).tobytes())
        if trained is not None:
            masks.append(trained.astype(np.bool_))
    if found != count:
        raise DataError(f"{found} sequences were encoded where {count} were expected: the text changed meanwhile")
    total = int(offsets[-1])
    for mask in masks:
        file.write(mask.tobytes())
    arrays = [("offsets", "I64", count + 1), ("ids", "U16" if width is np.uint16 else "U32", total)]
    if masks:
        arrays.append(("trained", "BOOL", total))
    file.seek(0)
    file.write(_header(arrays))
    file.write(offsets.tobytes())
    return total


def open_tokens(folder: Path) -> Tokens:
    """Return the sequences of a folder; their bytes are read when they are looked at.

    Raises:
        DataError: the file is missing, cut or something else.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            return read_tokens(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). Remove the folder; the next run makes it again.") from None


def read_tokens(buffer: Any) -> Tokens:
    """Return the sequences of a file's bytes as views of them.

    Raises:
        ValueError, KeyError, TypeError: they are not what `write_tokens` wrote.
    """
    size = int.from_bytes(buffer[:8], "little")
    header = json.loads(bytes(buffer[8 : 8 + size]))

    def view(name: str) -> Array:
        start, stop = header[name]["data_offsets"]
        (count,) = header[name]["shape"]
        if 8 + size + stop > len(buffer):
            raise ValueError("it is cut")
        dtype = _TYPES[header[name]["dtype"]]
        return np.frombuffer(buffer, dtype, count, 8 + size + start) if count else np.zeros(0, dtype)

    return Tokens(view("offsets"), view("ids"), view("trained") if "trained" in header else None)


def _header(arrays: list[tuple[str, str, int]]) -> bytes:
    """Return the safetensors header of flat arrays that follow each other: name, type, length."""
    record, end = {}, 0
    for name, dtype, length in arrays:
        start, end = end, end + length * np.dtype(_TYPES[dtype]).itemsize
        record[name] = {"dtype": dtype, "shape": [length], "data_offsets": [start, end]}
    text = json.dumps(record).encode()
    return (_HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(_HEADER_BYTES - 8)
