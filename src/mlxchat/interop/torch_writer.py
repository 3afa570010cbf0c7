"""Files as `torch.save` writes them, and nanochat's tokenizer.pkl, without torch and without pickle.

A .pt file is a zip whose data.pkl says how the tensors beside it are put together. That pickle is spelt here by hand
from the few instructions below; it names an ordered dict, one function that rebuilds a tensor, the kinds of
storage and tiktoken's Encoding, nothing else, so PyTorch's safe loader (`weights_only=True`) takes it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.interop.tensor_files import Array, Entry, bytes_of

_STORAGES = {"F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage", "I32": "IntStorage"}
_NUMBERS_ALIGNMENT = 64

# The instructions of a pickle that are ever written (https://docs.python.org/3/library/pickletools.html).
_PROTO, _GLOBAL, _EMPTY_TUPLE, _REDUCE, _MARK, _STOP = b"\x80", b"c", b")", b"R", b"(", b"."
_TUPLE, _BINUNICODE, _BININT, _LONG, _BINPERSID, _FALSE = b"t", b"X", b"J", b"\x8a", b"Q", b"\x89"
_SETITEMS, _NEWOBJ, _BUILD, _EMPTY_DICT = b"u", b"\x81", b"b", b"}"
_BINBYTES, _SHORT_BINBYTES = b"B", b"C"


def write_state(path: Path, entries: Sequence[Entry], read: Callable[[str], Iterable[Array]]) -> None:
    """Write an ordered dict of tensors as `torch.save` does.

    Args:
        path: of the .pt file; its name without the suffix is that of the zip's top folder, as PyTorch has it.
        entries: names, kinds (F32, BF16, F16) and shapes, in order.
        read: name → the numbers in one or several arrays, BF16 as their bits; called once for each entry, in order.
    """
    body = [_PROTO, b"\x02", _GLOBAL, b"collections\nOrderedDict\n", _EMPTY_TUPLE, _REDUCE, _MARK]
    for number, entry in enumerate(entries):
        body += [_text(entry.name), *_tensor(number, entry.dtype, entry.shape)]
    _write_zip(path, b"".join([*body, _SETITEMS, _STOP]), [(entry.num_bytes, entry.name) for entry in entries], read)


def write_tensor(path: Path, values: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    """Write one tensor of int32 as `torch.save` does."""
    body = b"".join([_PROTO, b"\x02", *_tensor(0, "I32", values.shape), _STOP])
    _write_zip(path, body, [(values.nbytes, "")], lambda name: [values])


def write_encoding(path: Path, pattern: str, ranks: Mapping[bytes, int], special_ids: Mapping[str, int]) -> None:
    """Write the tiktoken.Encoding that nanochat pickles as tokenizer.pkl.

    Args:
        path: of the file.
        pattern: how text is cut.
        ranks: token → id.
        special_ids: special token → id.
    """
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    body = [_PROTO, b"\x03", _GLOBAL, b"tiktoken.core\nEncoding\n", _EMPTY_TUPLE, _NEWOBJ, _EMPTY_DICT, _MARK]
    body += [_text("name"), _text("rustbpe"), _text("pat_str"), _text(pattern)]
    body += [_text("mergeable_ranks"), _EMPTY_DICT, _MARK]
    body += [part for token, rank in ordered for part in (_bytes(token), _integer(rank))]
    body += [_SETITEMS, _text("special_tokens"), _EMPTY_DICT, _MARK]
    body += [part for name, id_ in special_ids.items() for part in (_text(name), _integer(id_))]
    path.write_bytes(b"".join([*body, _SETITEMS, _SETITEMS, _BUILD, _STOP]))


def _tensor(number: int, dtype: str, shape: Sequence[int]) -> list[bytes]:
    """Return the call torch._utils._rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict())."""
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    count = int(np.prod(shape, dtype=np.int64))
    return [
        _GLOBAL, b"torch._utils\n_rebuild_tensor_v2\n", _MARK,
        _MARK, _text("storage"), _GLOBAL, b"torch\n" + _STORAGES[dtype].encode() + b"\n", _text(str(number)),
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
    """Write the zip, uncompressed, each part at a multiple of 64 bytes so that it can be mapped into memory."""
    top = path.stem
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, num_bytes: int, content: Iterable[bytes | memoryview]) -> None:
            info = zipfile.ZipInfo(f"{top}/{name}")
            large = num_bytes >= zipfile.ZIP64_LIMIT
            # A local header has 30 bytes, the name, a large file's sizes (20) and this filling, which PyTorch calls FB.
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
