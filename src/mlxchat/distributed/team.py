"""Remote calls from rank 0: it names a function and sends its arguments, and every rank calls it.

Rank 0 runs the stage like a single process. To share work it calls `Team.call`; the other ranks only wait in
`Team.follow` for such calls. So no other rank reads configuration, data or checkpoints, all ranks execute the same
collectives, and rank 0 can stop, save or fail between two calls like a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import mlx.core as mx
from numpy.typing import NDArray

from mlxchat.distributed.group import ALONE, LOST, Group
from mlxchat.errors import PeerLost

Given = Mapping[str, "mx.array | NDArray[Any]"]
Shared = Callable[["Team", dict[str, Any], dict[str, mx.array]], Any]


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

        Args:
            function: a module-level function of mlxchat; it must run the same collectives on every rank.
            request: JSON data.
            arrays: sent to all ranks, bit for bit.
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
