"""Reads and writes files of torch.save without torch, and writes nanochat's tokenizer.pkl.

A .pt file is a zip archive whose data.pkl describes the tensors in the members data/0, data/1, …. No code of a pickle
is executed: `read_pickle` returns plain data, whose descriptions of tensors are checked here.
Written pickles name only OrderedDict, _rebuild_tensor_v2, storage types and tiktoken's Encoding, so that PyTorch's safe
loader (`weights_only=True`) reads them.
"""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.data.vocabulary import Made, read_pickle
from mlxchat.errors import DataError
from mlxchat.interop.tensors import DTYPES, Array, Tensor, bytes_of, check_pointer

_REBUILD = "torch._utils._rebuild_tensor_v2"
_STORAGES = {f"torch.{dtype.storage}": dtype for dtype in DTYPES}
_AGAIN = "Copy it again."


def read_state(path: Path, where: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a saved state dict by name; their numbers stay in the file until they are read."""
    where = where or path.name
    check_pointer(path, where)
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
    except Exception as error:  # a damaged archive can raise any
        raise DataError(
            f"{where} is truncated or not a zip archive, as torch.save writes since 2020 ({error}). {_AGAIN} "
            "To convert older files: torch.save(torch.load(OLD, weights_only=True), NEW)"
        ) from None
    pickled = next((name for name in sizes if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise DataError(f"{where} is not a file of torch.save: it has no data.pkl")
    top = pickled.removesuffix("data.pkl")
    if f"{top}byteorder" in sizes and _member(path, where, f"{top}byteorder") != b"little":
        raise DataError(f"{where} was saved on a big-endian machine, which is not supported")
    content = read_pickle(
        _member(path, where, pickled), where=where, what="a file of torch.save", calls=[_REBUILD], types=_STORAGES
    )

    def tensor(made: Made) -> Tensor:
        storage, first, shape, strides, *_ = made.arguments
        _, kind, key, _, _ = storage.arguments[0]
        dtype, name = _STORAGES[kind], f"{top}data/{key}"
        if any(type(each) is not int or each < 0 for each in (first, *shape, *strides)):
            raise ValueError("its place or shape is impossible")
        contiguous = _strides(shape)
        if len(shape) != len(strides) or any(
            length != 1 and stride != wanted for length, stride, wanted in zip(shape, strides, contiguous, strict=True)
        ):
            raise ValueError(f"its shape is {list(shape)} and its strides {list(strides)}: it is not contiguous")
        end, width = first + prod(shape), np.dtype(dtype.numpy).itemsize
        if end > sizes[name] // width:
            raise ValueError(f"it needs {end:,} numbers, its storage has {sizes[name] // width:,}")

        def read() -> Array:
            data = memoryview(_member(path, where, name))
            return np.frombuffer(data[first * width : end * width], dtype.numpy).reshape(shape)

        return Tensor(dtype, tuple(shape), read)

    if not isinstance(content, dict) or not content:
        raise DataError(f"{where} is not a dictionary of tensors, as a model's file is")
    found = {}
    for name, value in content.items():
        if type(name) is not str or not isinstance(value, Made):
            raise DataError(f"{where} has an entry that is not a tensor: {str(name)[:80]}")
        try:
            found[name] = tensor(value)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise DataError(f"{where} is damaged: {name[:80]} is described wrongly ({error}). {_AGAIN}") from None
    return found


def _member(path: Path, where: str, name: str) -> bytes:
    """Return a member of the archive, whose checksum is compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except Exception as error:  # a damaged archive can raise any
        raise DataError(f"{where} is damaged ({error}). {_AGAIN}") from None


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in numbers."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def write_state(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an ordered dict of tensors (float32, float16, or uint16 for the bits of bfloat16) as `torch.save` does.

    The stem of `path` becomes the archive's top folder, as in PyTorch.
    """
    items = [_plain(name) + _tensor(number, array) for number, (name, array) in enumerate(arrays.items())]
    _write(path, _ORDERED_DICT + b"(" + b"".join(items) + b"u", list(arrays.values()))


def write_tensor(path: Path, values: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    """Write one tensor of int32 as `torch.save` does."""
    _write(path, _tensor(0, values), [values])


def write_encoding(path: Path, pattern: str, ranks: Mapping[bytes, int], special_ids: Mapping[str, int]) -> None:
    """Write the tiktoken.Encoding that nanochat pickles as tokenizer.pkl."""
    merges = dict(sorted(ranks.items(), key=lambda item: item[1]))
    state = {"name": "rustbpe", "pat_str": pattern, "mergeable_ranks": merges, "special_tokens": dict(special_ids)}
    path.write_bytes(b"\x80\x03ctiktoken.core\nEncoding\n)\x81" + _plain(state) + b"b.")


# Opcodes (https://docs.python.org/3/library/pickletools.html): c names a global, ( … t is a tuple, R calls,
# Q refers to a storage, ( … u sets items, )\x81 makes an object, b sets its state, . ends.
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def _plain(value: Any) -> bytes:
    """Return the opcodes of plain data, without the protocol before them and the end after them."""
    return pickle.dumps(value, protocol=3)[2:-1]


def _tensor(number: int, array: Array) -> bytes:
    """Return the call torch._utils._rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict())."""
    kind = next(dtype.storage for dtype in DTYPES if dtype.numpy == array.dtype.str)
    storage = (
        b"(" + _plain("storage") + f"ctorch\n{kind}\n".encode() + _plain(str(number)) + _plain("cpu")
        + _plain(array.size) + b"tQ"
    )  # fmt: skip
    place = _plain(0) + _plain(array.shape) + _plain(_strides(array.shape)) + _plain(False)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + _ORDERED_DICT + b"tR"


def _write(path: Path, pickled: bytes, arrays: Sequence[Array]) -> None:
    """Write the archive reproducibly and without compression."""
    members: dict[str, bytes | memoryview] = {"data.pkl": b"\x80\x02" + pickled + b".", "byteorder": b"little"}
    members |= {f"data/{number}": bytes_of(array) for number, array in enumerate(arrays)}
    members["version"] = b"3\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}"), content)
