"""MLX's collectives for the ranks of a run, and how rows are dealt to ranks.

Everything is evaluated at once, so that all ranks meet in the same order, and a lost rank raises `PeerLost`.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.errors import PeerLost
from mlxchat.ops.machine import BUCKET_BYTES

Arrays = dict[str, mx.array]


@dataclass
class Traffic:
    """What the collectives of this rank have cost so far."""

    sent_bytes: int = 0
    """Bytes that this rank sent, by the algorithms of a ring."""
    seconds: float = 0.0
    """Their duration, the wait for later ranks included."""


@dataclass(frozen=True)
class Group:
    """Ranks 0 to size − 1, this process being one of them. Rank 0 leads: it alone reads and writes files.

    Every method that sends something raises `PeerLost` if another rank is gone.
    """

    raw: Any = None
    """MLX's group; None: this process is alone."""
    backend: str = "none"
    """ring, jaccl, nccl or mpi."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    explain: Callable[[object], str] = field(default="another process of the group is gone ({})".format, compare=False)
    """Takes the error of a collective; returns what `PeerLost` says."""

    @property
    def rank(self) -> int:
        """Return this process's number."""
        return int(self.raw.rank()) if self.raw is not None else 0

    @property
    def size(self) -> int:
        """Return how many processes there are."""
        return int(self.raw.size()) if self.raw is not None else 1

    @property
    def leads(self) -> bool:
        """Tell whether this is rank 0."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return this rank's part of `count` things: contiguous, as equal as can be, empty if there are too few."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, arrays: Mapping[str, mx.array]) -> Arrays:
        """Return arrays summed over all ranks, the same bits on each; every rank gives the same names and shapes."""
        if self.size == 1:
            return dict(arrays)
        found: Arrays = {}
        for names in buckets(arrays):
            flat = mx.concatenate([arrays[name].reshape(-1) for name in names])
            total = self._meet(mx.distributed.all_sum, flat)
            borders = np.cumsum([arrays[name].size for name in names])[:-1].tolist()
            parts = mx.split(total, borders)
            found |= {name: part.reshape(arrays[name].shape) for name, part in zip(names, parts, strict=True)}
        return found

    def gather(self, array: mx.array) -> mx.array:
        """Return the arrays of all ranks, all of one shape and dtype, concatenated along their first axis."""
        return array if self.size == 1 else self._meet(mx.distributed.all_gather, array)

    def gather_json(self, value: Any) -> list[Any]:
        """Return what every rank gave, in their order; plain JSON data."""
        if self.size == 1:
            return [value]
        own = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        sizes = np.asarray(self.gather(mx.array([len(own)], dtype=mx.int32)))
        padded = np.zeros(int(sizes.max()), dtype=np.uint8)
        padded[: len(own)] = own
        rows = np.asarray(self.gather(mx.array(padded))).reshape(self.size, -1)
        return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def share(self, array: mx.array, source: int = 0) -> mx.array:
        """Return the array of rank `source`, bit for bit; the other ranks give one of the same shape and dtype."""
        if self.size == 1:
            return array
        # MLX has no broadcast. A sum with zeros is one; of integers, since −0.0 + 0.0 would lose its sign.
        whole = array if array.ndim else array.reshape(1)
        bits = whole.reshape(-1).view(mx.uint8)
        pad = -bits.size % 4
        words = (mx.pad(bits, (0, pad)) if pad else bits).view(mx.uint32)
        total = self._meet(mx.distributed.all_sum, words if self.rank == source else mx.zeros_like(words))
        return total.view(mx.uint8)[: bits.size].view(array.dtype).reshape(array.shape)

    def share_json(self, value: Any = None) -> Any:
        """Return rank 0's value, plain JSON data; the values of the others are ignored."""
        if self.size == 1:
            return value
        own = np.frombuffer(json.dumps(value).encode() if self.leads else b"", dtype=np.uint8)
        size = int(np.asarray(self.share(mx.array([len(own)], dtype=mx.int32)))[0])
        found = self.share(mx.array(own) if self.leads else mx.zeros(size, dtype=mx.uint8))
        return json.loads(bytes(np.asarray(found)))

    def _meet(self, collective: Any, array: mx.array) -> mx.array:
        # Collectives of nccl run on the GPU; those of the others must not keep it waiting for the network.
        stream = None if self.backend == "nccl" else mx.cpu
        mx.eval(array)
        began = time.perf_counter()
        try:
            found: mx.array = collective(array, group=self.raw, stream=stream)
            mx.eval(found)
        except RuntimeError as error:
            raise PeerLost(self.explain(error)) from error
        # Around a ring a sum takes 2 (n − 1) messages of an n-th, a gathering n − 1 of a whole.
        share = 2 / self.size if collective is mx.distributed.all_sum else 1
        self.traffic.sent_bytes += round(array.nbytes * share * (self.size - 1))
        self.traffic.seconds += time.perf_counter() - began
        return found


ALONE = Group()
"""The group of a process that has no others."""


def buckets(arrays: Mapping[str, mx.array]) -> Iterator[Sequence[str]]:
    """Yield the names of arrays by those of one dtype that travel together."""
    bucket: list[str] = []
    size, dtype = 0, None
    for name, array in arrays.items():
        if bucket and (array.dtype != dtype or size + array.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size, dtype = size + array.nbytes, array.dtype
    if bucket:
        yield bucket


def deal_padded(lengths: Sequence[int], parts: int) -> list[slice]:
    """Return contiguous parts of rows, of which the most expensive costs as little as possible; some may be empty.

    A part costs its rows times its longest row, since rows are padded to one length. So rows of similar length should
    be neighbours.

    Args:
        lengths: of the rows, in tokens.
        parts: how many, at least 1.
    """
    longest = max(lengths, default=0)
    costs = range(longest, len(lengths) * longest)
    place = bisect_left(costs, True, key=lambda most: len(_fill(lengths, most)) <= parts)
    found = _fill(lengths, longest + place)
    return found + [slice(len(lengths), len(lengths))] * (parts - len(found))


def _fill(lengths: Sequence[int], most: int) -> list[slice]:
    """Return the fewest parts of which none costs more than `most`, the length of a row at least."""
    found: list[slice] = []
    start = longest = 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if longest * (place + 1 - start) > most:
            found.append(slice(start, place))
            start, longest = place, length
    return [*found, slice(start, len(lengths))] if start < len(lengths) else found
