"""Remote calls from rank 0, which names a function and sends its arguments, and MLX's collectives.

Rank 0 runs the stage like a single process. To share work it calls `Team.call`; the other ranks only wait in
`Team.follow` for such calls. So no other rank reads configuration, data or checkpoints, all ranks execute the same
collectives, and rank 0 can stop, save or fail between two calls like a single process. Collectives are evaluated
immediately, so that all ranks run them in the same order.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxchat.errors import PeerLost

Given = Mapping[str, "mx.array | NDArray[Any]"]
Shared = Callable[["Team", dict[str, Any], dict[str, mx.array]], Any]


Arrays = dict[str, mx.array]

BUCKET_BYTES = 64 * 2**20  # maximum bytes of a collective, so that no second copy of a whole model is in memory
LOST = "another rank has ended; its own output says why. The same command continues from the last saved state"


@dataclass
class Group:
    """Ranks 0 to size − 1, one of which is this process. Only rank 0, the leader, reads and writes files.

    Every method that communicates raises `PeerLost` if another rank has ended.
    """

    raw: Any = None  # MLX's group; None for a single process
    backend: str = "none"  # ring, jaccl, nccl or mpi
    seconds: float = 0.0  # time spent in collectives so far, including the wait for other ranks

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
            raise PeerLost(f"{LOST} ({error})") from error
        self.seconds += time.perf_counter() - began
        return found


ALONE = Group()  # the group of a single process


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


class Team:
    """The ranks of a group during a step, and the state that each keeps between calls."""

    def __init__(self, group: Group = ALONE, hosts: Sequence[str] = ("",)) -> None:
        """`hosts`: name of each rank's machine."""
        self.group, self.hosts = group, list(hosts)
        self.is_broken = False
        """Whether a call has begun and not succeeded: the ranks may then be at different collectives."""
        self.kept: dict[str, Any] = {}
        """Name → objects that functions keep on this rank for later calls: model, optimizer, …"""

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.group.size

    @property
    def neighbours(self) -> int:
        """The number of ranks on this machine."""
        return self.hosts.count(self.hosts[self.group.rank])

    def describe(self) -> dict[str, Any]:
        """Return number, backend and hosts of the ranks, for records."""
        return {"size": self.size, "backend": self.group.backend, "hosts": self.hosts}

    def call(self, function: Shared, request: dict[str, Any] | None = None, arrays: Given | None = None) -> Any:
        """Call `function(team, request, arrays)` on every rank; return rank 0's result.

        It is a module-level function of mlxchat, which runs the same collectives on every rank. `request` is JSON data;
        `arrays` arrive bit for bit.
        """
        given = {name: mx.array(value) for name, value in (arrays or {}).items()}
        if self.size > 1:
            assert self.group.leads, "only rank 0 calls"
            shapes = {name: [list(array.shape), name_of(array.dtype)] for name, array in given.items()}
            name = f"{function.__module__}:{function.__qualname__}"
            if self.is_broken:
                raise PeerLost(LOST)
            self.is_broken = True
            self.group.share_json({"function": name, "request": request or {}, "arrays": shapes})
            for array in given.values():
                self.group.share(array)
        found = function(self, request or {}, given)
        self.is_broken = False
        return found

    def follow(self) -> None:
        """Execute the calls of rank 0 until it shares None."""
        while (order := self.group.share_json()) is not None:
            module, _, name = order["function"].partition(":")
            assert module.partition(".")[0] == "mlxchat", module
            function: Shared = getattr(import_module(module), name)
            arrays = {
                key: self.group.share(mx.zeros(shape, dtype=getattr(mx, dtype)))
                for key, (shape, dtype) in order["arrays"].items()
            }
            function(self, order["request"], arrays)


def name_of(dtype: mx.Dtype) -> str:
    """Return 'float32' for `mx.float32`; `getattr(mx, name)` is the inverse."""
    return str(dtype).rpartition(".")[2]
