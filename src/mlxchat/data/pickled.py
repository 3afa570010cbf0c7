"""A safe unpickler for plain data and an allow-list of names; it executes no code of the pickle.

Python's unpickler, even with `find_class` overridden, can be made to allocate without bound and to recurse in C. This
one supports the opcodes that torch.save and pickle.dump write for plain data, refuses names that its caller did not
list, calls only the caller's functions, and limits size and number of operations.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from mlxchat.errors import DataError

MOST_BYTES = 32 << 20
"""Maximum size of a pickle; a vocabulary of 400,000 tokens has 8 MiB."""
_MOST_OPERATIONS = 2_000_000
_KEYS = (str, bytes)
_MOST_NUMBERED = 1 << 20  # an optimizer's state is numbered

Names = Mapping[tuple[str, str], Any]
"""(module, name) → its replacement. Only `Maker`s can be called."""


class Maker:
    """The caller's replacement of a function or class that a pickle calls."""

    def __init__(self, make: Callable[..., Any]) -> None:
        """`make` is called with the pickle's arguments."""
        self.make = make


class Made:
    """A placeholder of an object: its constructor's arguments and its state."""

    def __init__(self, *arguments: Any) -> None:
        """Store the arguments."""
        self.arguments: tuple[Any, ...] = arguments
        self.state: Any = None


class OrderedNames(dict[Any, Any]):
    """Replaces collections.OrderedDict; its attributes (torch stores versions there) are dropped."""

    def __init__(self) -> None:
        """Take no argument, whose items would be hashed to any depth; items are set one by one."""
        super().__init__()


class _Mark:
    """Marks the beginning of a group on the stack."""


_MARK = _Mark()


class _Refused(Exception):
    """The pickle is refused; the text is the reason."""


def read_pickle(
    data: bytes, names: Names, *, where: str, what: str, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Return the object of a pickle: plain data and replacements of the allowed names.

    Args:
        data: protocols 2 to 5, at most MOST_BYTES.
        names: the allowed names.
        where: the file, for messages.
        what: the expected content, for messages, such as "a torch file".
        persistent: returns the object of a persistent id; None: persistent ids are refused.

    Raises:
        DataError: the pickle is damaged or uses anything else. No code of it was executed.
    """
    try:
        if len(data) > MOST_BYTES:
            raise _Refused(f"its pickle has {len(data):,} bytes, more than {MOST_BYTES:,}")
        return _Machine(data, names, persistent).run()
    except _Refused as error:
        raise DataError(f"{where} is not {what} that can be read: {error}. No code of it was executed.") from None
    except (struct.error, IndexError):
        raise DataError(f"{where} is truncated or damaged (its pickle ends too early). Copy it again.") from None
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise DataError(f"{where} is not {what} that can be read ({reason}). No code of it was executed.") from None


def brief(value: Any) -> str:
    """Return a value of a pickle for a message: the beginning of a text, a number, or the name of its type.

    Containers are never formatted: those of a few bytes can have texts that exceed the memory.
    """
    if type(value) is str:
        return value[:80]
    if type(value) is bytes:
        return repr(value[:80])
    short = value is None or (type(value) is int and value.bit_length() <= 64)
    return str(value) if short else type(value).__name__


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, data: bytes, names: Names, persistent: Callable[[Any], Any] | None) -> None:
        self._data, self._at = data, 0
        self._names, self._persistent = names, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MOST_OPERATIONS):
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                if len(self._stack) != 1:
                    raise _Refused("its stack is not empty at the end")
                return self._stack[0]
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise _Refused(f"it uses the opcode {chr(code)!r}, which plain data do not need")
            operation(self)
        raise _Refused(f"it takes more than {_MOST_OPERATIONS:,} operations")

    def _take(self, count: int) -> bytes:
        if count < 0 or count > len(self._data) - self._at:
            raise IndexError
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at)
        return self._take(end + 1 - self._at)[:-1].decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if isinstance(value, _Mark):
            raise _Refused("its stack is out of order")
        return value

    def _group(self) -> list[Any]:
        """Remove the last mark and everything after it; return the latter."""
        for index in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[index], _Mark):
                group = self._stack[index + 1 :]
                del self._stack[index:]
                return group
        raise _Refused("a mark is missing")

    def _tuple(self, count: int) -> None:
        self._push(tuple(reversed([self._pop() for _ in range(count)])))

    def _text(self, form: str) -> None:
        self._push(self._take(self._number(form)).decode("utf-8", "surrogatepass"))

    def _bytes(self, form: str) -> None:
        self._push(self._take(self._number(form)))

    def _integer(self, form: str) -> None:
        self._push(int.from_bytes(self._take(self._number(form)), "little", signed=True))

    def _remember(self, place: int) -> None:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise _Refused("it stores an empty stack in its memo")
        self._memo[place] = self._stack[-1]

    def _recall(self, place: int) -> None:
        if place not in self._memo:
            raise _Refused(f"it reads the empty memo entry {place}")
        self._push(self._memo[place])

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise _Refused("it puts items into something that is not a dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Hashing other types could recurse to any depth or collide.
            if type(key) not in _KEYS and not (type(key) is int and 0 <= key < _MOST_NUMBERED):
                raise _Refused(f"a dictionary has a key of type {type(key).__name__} that no such file has")
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise _Refused("it appends to something that is not a list")
        target.extend(items)

    def _name(self, module: Any, name: Any) -> None:
        known = self._names.get((module, name)) if type(module) is str and type(name) is str else None
        if known is None:
            raise _Refused(f"it names {brief(module)}.{brief(name)}, which such a file does not need")
        self._push(known)

    def _stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Maker) or type(arguments) is not tuple:
            raise _Refused("it calls something that is not an allowed function")
        self._push(function.make(*arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, Made):
            target.state = state
        elif not isinstance(target, OrderedNames):
            raise _Refused("it sets the state of something that has none")

    def _persist(self) -> None:
        if self._persistent is None:
            raise _Refused("it refers to data outside of it")
        self._push(self._persistent(self._pop()))

    def _skip_frame(self) -> None:
        self._take(8)  # the frame's size is redundant

    def _protocol(self) -> None:
        if self._number("<B") > 5:
            raise _Refused("its protocol is above 5")


_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: m._protocol(),
    0x95: lambda m: m._skip_frame(),
    ord("("): lambda m: m._push(_MARK),
    ord("}"): lambda m: m._push({}),
    ord("]"): lambda m: m._push([]),
    ord(")"): lambda m: m._push(()),
    ord("t"): lambda m: m._push(tuple(m._group())),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("s"): lambda m: m._set_items([m._pop(), m._pop()][::-1]),
    ord("u"): lambda m: m._set_items(m._group()),
    ord("a"): lambda m: m._append([m._pop()]),
    ord("e"): lambda m: m._append(m._group()),
    ord("X"): lambda m: m._text("<I"),
    0x8C: lambda m: m._text("<B"),
    0x8D: lambda m: m._text("<Q"),
    ord("B"): lambda m: m._bytes("<I"),
    ord("C"): lambda m: m._bytes("<B"),
    0x8E: lambda m: m._bytes("<Q"),
    ord("J"): lambda m: m._push(m._number("<i")),
    ord("K"): lambda m: m._push(m._number("<B")),
    ord("M"): lambda m: m._push(m._number("<H")),
    0x8A: lambda m: m._integer("<B"),
    ord("G"): lambda m: m._push(m._number(">d")),
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("q"): lambda m: m._remember(m._number("<B")),
    ord("r"): lambda m: m._remember(m._number("<I")),
    0x94: lambda m: m._remember(len(m._memo)),
    ord("h"): lambda m: m._recall(m._number("<B")),
    ord("j"): lambda m: m._recall(m._number("<I")),
    ord("c"): lambda m: m._name(m._line(), m._line()),
    0x93: lambda m: m._stack_name(),
    ord("R"): lambda m: m._call(),
    0x81: lambda m: m._call(),  # NEWOBJ
    ord("b"): lambda m: m._build(),
    ord("Q"): lambda m: m._persist(),
}
