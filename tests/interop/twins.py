"""Small models in nanochat's format, written without its code."""

import io
import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiktoken

from mlxchat.config.schema import ImportConfig
from mlxchat.data.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN
from mlxchat.interop.names import expected_shapes, sizes_from_nanochat
from mlxchat.model.sizes import GPTSizes

LATER = ["value_embeds.", "resid_lambdas", "x0_lambdas", "smear_gate.", "smear_lambda", "backout_lambda"]
_STORAGES = {"f4": "FloatStorage", "u2": "BFloat16Storage", "i4": "IntStorage", "i8": "LongStorage"}


class _Storage(NamedTuple):
    kind: type
    key: str
    count: int


@contextmanager
def torch_by_name() -> Iterator[tuple[types.ModuleType, types.ModuleType]]:
    """Install dummy modules torch and torch._utils that pickles can refer to."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in _STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*_: Any) -> None:
        raise AssertionError("never called")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        yield torch, utils


class Tensor:
    """A tensor to write: NumPy's numbers (uint16: the bits of bfloat16), or `part` of those of a shared storage."""

    def __init__(self, numbers: np.ndarray[Any, Any], *, storage: str | None = None, part: slice = slice(None)) -> None:
        self.numbers, self.storage, self.part = numbers, storage, part

    def place(self, storage: _Storage) -> tuple[Any, ...]:
        shape = self.numbers[self.part].shape
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
        first = (self.part.start or 0) * int(np.prod(shape[1:]))
        return (storage, first, shape, strides, False, OrderedDict())


def write_torch(path: Path, content: dict[str, Tensor]) -> None:
    """Write a file as torch.save does: a stored zip with a pickle and a member for each storage."""
    members: dict[str, bytes] = {}
    with torch_by_name() as (torch, utils):

        class Pickler(pickle.Pickler):
            """Refers to storages by persistent ids, as torch.save does."""

            def persistent_id(self, thing: Any) -> Any:
                return ("storage", thing.kind, thing.key, "cuda:0", thing.count) if type(thing) is _Storage else None

            def reducer_override(self, thing: Any) -> Any:
                return (utils._rebuild_tensor_v2, places[thing]) if isinstance(thing, Tensor) else NotImplemented

        places: dict[Tensor, tuple[Any, ...]] = {}
        for value in content.values():
            key = value.storage or str(len(members))
            kind = getattr(torch, _STORAGES[value.numbers.dtype.str[1:]])
            members.setdefault(f"data/{key}", value.numbers.tobytes())
            places[value] = value.place(_Storage(kind, key, value.numbers.size))
        buffer = io.BytesIO()
        Pickler(buffer, protocol=2).dump(OrderedDict(content))
    write_zip(path, {"data.pkl": buffer.getvalue(), "byteorder": b"little", **members, "version": b"3\n"})


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)  # the same bytes at any time


def encoding_of(num_merged: int = 20) -> tiktoken.Encoding:
    """Return an encoding of the 256 bytes and some pairs of letters."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for index in range(num_merged):
        ranks[bytes([97 + index % 26, 97 + (index * 7 + 1) % 26]) + b"x" * (index // 26)] = len(ranks)
    names = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=names)


@dataclass
class Twin:
    """A nanochat checkpoint of a tiny random model."""

    folder: Path
    sizes: GPTSizes
    tensors: dict[str, np.ndarray[Any, Any]]
    """Our name → float32; the tables were stored as bfloat16."""

    def config(self, **settings: Any) -> ImportConfig:
        given = {"name": "twin", "format": "nanochat", "repository": None, "revision": "main",
                 "folder": str(self.folder), "step": None, "chat": None}  # fmt: skip
        return ImportConfig(**{**given, **settings})


def make_twin(folder: Path, *, later: bool = False, prefix: str = "", seed: int = 0, random: bool = True) -> Twin:
    """Write a nanochat checkpoint of either architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    encoding = encoding_of()
    meta = {"sequence_len": 64, "vocab_size": encoding.n_vocab, "n_layer": 2, "n_head": 2,
            "n_kv_head": 1, "n_embd": 32, **({"window_pattern": "SL"} if later else {})}  # fmt: skip
    sizes = sizes_from_nanochat(meta, LATER * later, "twin")
    draw, tensors, stored = np.random.default_rng(seed), {}, {}
    for name, shape in expected_shapes(sizes).items():
        numbers = (0.3 * draw.standard_normal(shape)).astype(np.float32) if random else np.ones(shape, np.float32)
        if "wte" in name or "value_embeds" in name:
            bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
            numbers = (bits.astype(np.uint32) << 16).view(np.float32)
            stored[prefix + name] = Tensor(bits)
        else:
            stored[prefix + name] = Tensor(numbers)
        tensors[name] = numbers
    write_torch(folder / "model_000007.pt", stored)
    (folder / "meta_000007.json").write_text(json.dumps({"step": 7, "val_loss": 1.5, "model_config": meta}))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return Twin(folder, sizes, tensors)
