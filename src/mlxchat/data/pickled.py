"""Reads foreign pickles as plain data: Python's unpickler with an allow-list of names, none of which is called.

`find_class` replaces an allowed function or class by a `Made`, which stores the arguments and the state, and an allowed
storage type by its name. Callers check what they get; until then all of it is untrusted.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Self

from mlxchat.errors import DataError


class Made:
    """An object that a pickle describes: the name of its function or class, the arguments and the state."""

    name = ""
    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any) -> Self:
        """Store the arguments, with which a pickle calls a class."""
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = None
        return made

    def __setstate__(self, state: Any) -> None:
        """Store the state, instead of setting attributes."""
        self.state = state


class _Reader(pickle.Unpickler):
    """Python's unpickler, which gets every name from `find_class`."""

    def __init__(self, data: bytes, calls: Collection[str], types: Collection[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._calls = calls
        self._types = types

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of an allowed name."""
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if full in self._types:
            return full
        if full in self._calls:
            return type(full, (Made,), {"name": full})
        raise pickle.UnpicklingError(f"it names {full[:80]}, which such a file does not need")

    def persistent_load(self, key: Any) -> Any:
        """Return the description of data outside the pickle."""
        return Made(key)


def read_pickle(data: bytes, *, where: str, what: str, calls: Collection[str], types: Collection[str] = ()) -> Any:
    """Return the content of a pickle; raises DataError if it is damaged or uses other names. No code of it is executed.

    Each call of a function or class in `calls` becomes a `Made`, the names `types` text. `where` and `what` (the file
    and its expected content) are for messages.
    """
    try:
        return _Reader(data, calls, types).load()
    except Exception as error:  # a damaged pickle can raise any
        raise DataError(
            f"{where} is damaged or is not {what} ({error or type(error).__name__}). No code of it was executed"
        ) from None
