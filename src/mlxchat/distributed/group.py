"""MLX's collectives for the ranks of a run, and the distribution of rows to ranks.

Collectives are evaluated immediately, so that all ranks run them in the same order; a lost rank raises `PeerLost`.
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
    """Cost of this rank's collectives so far."""

    sent_bytes: int = 0
    """Bytes sent by this rank, computed for ring algorithms."""
    seconds: float = 0.0
    """Duration, including the wait for other ranks."""


@dataclass(frozen=True)
class Group:
    """Ranks 0 to size − 1, one of which is this process. Only rank 0, the leader, reads and writes files.

    Every method that communicates raises `PeerLost` if another rank is lost.
    """

    raw: Any = None
    """MLX's group; None for a single process."""
    backend: str = "none"
    """ring, jaccl, nccl or mpi."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    explain: Callable[[object], str] = field(default="another process of the group is gone ({})".format, compare=False)
    """Takes the error of a collective; returns the message of `PeerLost`."""

    @property
    def rank(self) -> int:
        """This process's number."""
        return int(self.raw.rank()) if self.raw is not None else 0

    @property
    def size(self) -> int:
        """The number of processes."""
        return int(self.raw.size()) if self.raw is not None else 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return this rank's slice of `count` items: contiguous, sizes differ by at most 1; it may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, arrays: Mapping[str, mx.array]) -> Arrays:
        """Return arrays summed over all ranks, bit-identical on each; all ranks pass the same names and shapes."""
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
        """Return the arrays of all ranks, of equal shape and dtype, concatenated along the first axis."""
        return array if self.size == 1 else self._meet(mx.distributed.all_gather, array)

    def gather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, JSON data, in the order of ranks."""
        if self.size == 1:
            return [value]
        own = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        sizes = np.asarray(self.gather(mx.array([len(own)], dtype=mx.int32)))
        padded = np.zeros(int(sizes.max()), dtype=np.uint8)
        padded[: len(own)] = own
        rows = np.asarray(self.gather(mx.array(padded))).reshape(self.size, -1)
        return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def share(self, array: mx.array, source: int = 0) -> mx.array:
        """Return the array of rank `source`, bit for bit; other ranks pass any array of that shape and dtype."""
        if self.size == 1:
            return array
        # MLX has no broadcast: sum with zeros, as integers because −0.0 + 0.0 loses the sign.
        whole = array if array.ndim else array.reshape(1)
        bits = whole.reshape(-1).view(mx.uint8)
        pad = -bits.size % 4
        words = (mx.pad(bits, (0, pad)) if pad else bits).view(mx.uint32)
        total = self._meet(mx.distributed.all_sum, words if self.rank == source else mx.zeros_like(words))
        return total.view(mx.uint8)[: bits.size].view(array.dtype).reshape(array.shape)

    def share_json(self, value: Any = None) -> Any:
        """Return rank 0's value, JSON data; the values of other ranks are ignored."""
        if self.size == 1:
            return value
        own = np.frombuffer(json.dumps(value).encode() if self.leads else b"", dtype=np.uint8)
        size = int(np.asarray(self.share(mx.array([len(own)], dtype=mx.int32)))[0])
        found = self.share(mx.array(own) if self.leads else mx.zeros(size, dtype=mx.uint8))
        return json.loads(bytes(np.asarray(found)))

    def _meet(self, collective: Any, array: mx.array) -> mx.array:
        # NCCL runs on the GPU; other backends must not make the GPU wait for the network.
        stream = None if self.backend == "nccl" else mx.cpu
        mx.eval(array)
        began = time.perf_counter()
        try:
            found: mx.array = collective(array, group=self.raw, stream=stream)
            mx.eval(found)
        except RuntimeError as error:
            raise PeerLost(self.explain(error)) from error
        # In a ring of n ranks a sum sends 2 (n − 1) messages of 1/n of the array, a gather n − 1 whole arrays.
        share = 2 / self.size if collective is mx.distributed.all_sum else 1
        self.traffic.sent_bytes += round(array.nbytes * share * (self.size - 1))
        self.traffic.seconds += time.perf_counter() - began
        return found


ALONE = Group()
"""The group of a single process."""


def buckets(arrays: Mapping[str, mx.array]) -> Iterator[Sequence[str]]:
    """Yield names of consecutive arrays of one dtype, in buckets of at most BUCKET_BYTES."""
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
    """Return contiguous slices of rows with the least possible maximum cost; some may be empty.

    Rows of a slice are padded to its longest row, so its cost is the number of rows times that length. Rows of similar
    length should be neighbours.

    Args:
        lengths: of the rows, in tokens.
        parts: number of slices, at least 1.
    """
    longest = max(lengths, default=0)
    costs = range(longest, len(lengths) * longest)
    place = bisect_left(costs, True, key=lambda most: len(_fill(lengths, most)) <= parts)
    found = _fill(lengths, longest + place)
    return found + [slice(len(lengths), len(lengths))] * (parts - len(found))


def _fill(lengths: Sequence[int], most: int) -> list[slice]:
    """Return the fewest slices that cost at most `most` each; `most` is at least the longest row."""
    found: list[slice] = []
    start = longest = 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if longest * (place + 1 - start) > most:
            found.append(slice(start, place))
            start, longest = place, length
    return [*found, slice(start, len(lengths))] if start < len(lengths) else found
