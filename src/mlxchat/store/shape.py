"""The types of what manifests hold: one that came from elsewhere may be any JSON.

Everything that reads a manifest relies on these types, so they are checked where the file is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_EACH = "*"  # of a mapping with any keys
_TEXT, _NUMBER, _OBJECT = str | None, int | float | None, dict | None
_INPUT = {"rid": str, "tree": str, "artifact": _TEXT, "step": _TEXT, "stage": _TEXT}
_FILE = {"path": str, "bytes": int, "sha256": str}
_RANKS = {"size": int, "backend": str, "hosts": [str]}
# What a key holds: a type, [of each item], or {key: of its value}. Keys that are not listed hold any JSON.
_MANIFEST: Mapping[str, Any] = {
    "schema": int, "key": _TEXT, "rid": str, "name": str, "stage": str, "step": _TEXT,
    "kind": str, "version": int, "config": dict, "full_config": dict, "overrides": [str],
    "excluded": {"ranks": _RANKS}, "inputs": {_EACH: _INPUT}, "outputs": [_FILE], "tree": str, "pins": {_EACH: str},
    "externals": [dict], "metrics": {_EACH: _NUMBER}, "derived": {"predicted_peak_bytes": _NUMBER},
    "tokens_per_second": _NUMBER, "data_wait_frac": _NUMBER, "attempts": [dict], "seconds": _NUMBER,
    "peak_memory_bytes": _NUMBER, "peak_array_bytes": _NUMBER, "code": {"modules": {_EACH: str}},
    "git": _OBJECT, "versions": dict, "device": dict, "run": _TEXT, "published": str,
}  # fmt: skip
_WORDS = {
    dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false",
    int | float: "a number", _TEXT: "text or null", _NUMBER: "a number or null",
    _OBJECT: "an object or null",
}  # fmt: skip
_MOST_NUMBER = 1e300  # larger integers cannot become floats
_MOST_DEPTH = 64
_LARGE = re.compile(r"[0-9]{300}|e\+[0-9]{3}")  # every number from 1e300, and some others
_HALF = re.compile("[\ud800-\udfff]")  # of a pair of UTF-16


def find_misshapen(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every value in a manifest whose type is not the one that its readers rely on."""
    yield from find_wrong_types(manifest, _MANIFEST, "")
    if not _is_plain(manifest):
        yield from _find_odd(manifest, "", _MOST_DEPTH)


def _is_plain(manifest: Mapping[str, Any]) -> bool:
    """Tell whether `_find_odd` would find nothing, at a small part of its cost: every start of a command asks."""
    try:
        text = json.dumps(manifest, ensure_ascii=False, allow_nan=False)
        text.encode()
        return not _LARGE.search(text) and _count_levels(manifest) <= _MOST_DEPTH
    except (ValueError, RecursionError):
        return False


def _count_levels(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value
    return 1 + max([_count_levels(item) for item in items if item.__class__ in (dict, list)], default=0)


def find_wrong_types(value: Any, expected: Any, where: str) -> Iterator[str]:
    """Yield a line for each part of a value that has another type than `expected`, which is written as `_MANIFEST`."""
    kind: Any = expected.__class__ if expected.__class__ in (list, dict) else expected
    if not isinstance(value, kind):
        yield f"{where} is {str(value)[:40]!r}, expected {_WORDS[kind]}"
    elif expected.__class__ is list:
        for position, item in enumerate(value):
            yield from find_wrong_types(item, expected[0], f"{where}[{position}]")
    elif expected.__class__ is dict:
        for key, item in value.items():
            if (wanted := expected.get(_EACH) or expected.get(key)) is not None:
                yield from find_wrong_types(item, wanted, f"{where}.{key}" if where else key)


def _find_odd(value: Any, where: str, depth: int) -> Iterator[str]:
    """Yield what no own manifest holds: numbers beyond all bounds, halves of characters, hundreds of levels."""
    if isinstance(value, dict | list):
        if not depth:
            yield f"{where[:80]}… is nested more than {_MOST_DEPTH} levels deep"
            return
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                yield from _find_odd(key, where, depth)
            yield from _find_odd(item, f"{where}.{key}".lstrip("."), depth - 1)
    elif isinstance(value, int | float) and not abs(value) < _MOST_NUMBER:
        yield f"{where} is {str(value)[:40]}, expected a number below {_MOST_NUMBER:g}"
    elif isinstance(value, str) and _HALF.search(value):
        yield f"{where} holds half a character"
