"""How rank 0 has all ranks do something: it names a function, sends its arguments, and every rank calls it.

Rank 0 runs the stage as if it were alone. Where there is work to share it calls `Team.call`; the other ranks wait in
`Team.follow` for such calls and do nothing else. So no other rank reads a configuration, data or a checkpoint, all take
the same path, and rank 0 may stop, save or fail between two calls as a single process may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import mlx.core as mx
from numpy.typing import NDArray

from mlxchat.distributed.group import ALONE, Group

Given = Mapping[str, "mx.array | NDArray[Any]"]
Shared = Callable[["Team", dict[str, Any], dict[str, mx.array]], Any]


class Team:
    """The ranks of a group at work on one step, and what each keeps between calls."""

    def __init__(self, group: Group = ALONE, wake: Callable[[], None] = lambda: None) -> None:
        """Begin without anything kept; rank 0 calls `wake` before each call, if ranks do not wait in the group."""
        self.group, self._wake = group, wake
        self.open = False
        """Whether a call has begun and not succeeded here: then the ranks may be at different places."""
        self.kept: dict[str, Any] = {}
        """By name, what functions keep on this rank for later calls: model, optimizer, …"""

    @property
    def size(self) -> int:
        """Return how many ranks there are."""
        return self.group.size

    def call(self, function: Shared, request: dict[str, Any] | None = None, arrays: Given | None = None) -> Any:
        """Have every rank call `function(team, request, arrays)`; return its result on rank 0.

        Args:
            function: of a module of mlxchat, by name; its collectives must be the same on every rank.
            request: plain JSON data.
            arrays: sent to all ranks, bit for bit.
        """
        given = {name: mx.array(value) for name, value in (arrays or {}).items()}
        if self.size > 1:
            assert self.group.leads, "only rank 0 calls"
            shapes = {name: [list(array.shape), name_of(array.dtype)] for name, array in given.items()}
            name = f"{function.__module__}:{function.__qualname__}"
            self.open = True
            self._wake()
            self.group.share_json({"function": name, "request": request or {}, "arrays": shapes})
            for array in given.values():
                self.group.share(array)
        found = function(self, request or {}, given)
        self.open = False
        return found

    def follow(self, wait: Callable[[], bool] = lambda: True) -> None:
        """Take part in the calls of rank 0 until `wait`, called before each, returns False, or rank 0 shares None."""
        while wait() and (order := self.group.share_json()) is not None:
            module, _, name = order["function"].partition(":")
            assert module.partition(".")[0] == "mlxchat", module
            function: Shared = getattr(import_module(module), name)
            arrays = {
                key: self.group.share(mx.zeros(shape, dtype=getattr(mx, dtype)))
                for key, (shape, dtype) in order["arrays"].items()
            }
            function(self, order["request"], arrays)


def name_of(dtype: mx.Dtype) -> str:
    """Return 'float32' for `mx.float32`, of which `getattr(mx, name)` is the inverse."""
    return str(dtype).rpartition(".")[2]
