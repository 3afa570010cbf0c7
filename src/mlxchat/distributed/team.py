"""How rank 0 has all ranks do something: it names a function, sends what it needs, and every rank calls it.

Rank 0 runs the stage as if it were alone. Where there is work to share it calls `Team.call`; the other ranks wait in
`Team.follow` for such calls and do nothing else. So no other rank reads a configuration, data or a checkpoint, none
can leave the common path, and rank 0 may stop, save or fail between two calls as a single process may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

import mlx.core as mx
from numpy.typing import NDArray

from mlxchat.distributed.group import ALONE, Group

Given = Mapping[str, "mx.array | NDArray[Any]"]
Shared = Callable[["Team", dict[str, Any], dict[str, mx.array]], Any]
_END = ""


class Orders(Protocol):
    """A way from rank 0 to the others that costs nothing while nobody says anything: who waits in MLX's ring spins."""

    def send(self, order: dict[str, Any]) -> None:
        """Tell all followers; called on rank 0."""

    def receive(self) -> dict[str, Any]:
        """Return what rank 0 said next; called on the others."""


class _InTheGroup:
    """Orders that go through the group itself."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def send(self, order: dict[str, Any]) -> None:
        self.group.share_json(order)

    def receive(self) -> dict[str, Any]:
        found: dict[str, Any] = self.group.share_json()
        return found


class Team:
    """A group's ranks at work for one step, and what each keeps between calls."""

    def __init__(self, group: Group = ALONE, orders: Orders | None = None) -> None:
        """Keep nothing yet; orders go through the group where there is no other way."""
        self.group = group
        self.orders: Orders = orders or _InTheGroup(group)
        self.open = False
        """Whether a call has begun and not ended well here: then the ranks may no longer be at the same place."""
        self.kept: dict[str, Any] = {}
        """By name, what functions keep on this rank for later calls: model, optimizer, …"""

    @property
    def size(self) -> int:
        """Return how many ranks there are."""
        return self.group.size

    def call(self, function: Shared, request: dict[str, Any] | None = None, arrays: Given | None = None) -> Any:
        """Have every rank call `function(team, request, arrays)`; return what it returns here, on rank 0.

        Args:
            function: of a module of mlxchat, by name; its collectives must be the same on every rank.
            request: plain JSON data.
            arrays: sent to all ranks, bit for bit.

        Raises:
            PeerLost: another rank is gone.
        """
        given = {name: mx.array(value) for name, value in (arrays or {}).items()}
        if self.size > 1:
            assert self.group.leads, "only rank 0 asks"
            shapes = {name: [list(array.shape), str(array.dtype).rpartition(".")[2]] for name, array in given.items()}
            name = f"{function.__module__}:{function.__qualname__}"
            self.open = True
            self.orders.send({"function": name, "request": request or {}, "arrays": shapes})
            for array in given.values():
                self.group.share(array)
        found = function(self, request or {}, given)
        self.open = False
        return found

    def follow(self) -> None:
        """Do what rank 0 asks for, until it ends the team.

        Raises:
            PeerLost: rank 0 or another rank is gone.
        """
        while (order := self.orders.receive())["function"] != _END:
            module, _, name = order["function"].partition(":")
            assert module.partition(".")[0] == "mlxchat", module
            function: Shared = getattr(import_module(module), name)
            arrays = {
                key: self.group.share(mx.zeros(shape, dtype=getattr(mx, dtype)))
                for key, (shape, dtype) in order["arrays"].items()
            }
            function(self, order["request"], arrays)

    def end(self) -> None:
        """Let the other ranks go; called on rank 0."""
        if self.size > 1:
            self.orders.send({"function": _END, "request": {}, "arrays": {}})
