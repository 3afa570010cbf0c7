"""External data that a setting refers to, and how it is pinned: a step's key holds its contents or version.

A field's metadata has one of these: `field(default="poem.txt", metadata={"pin": File()})`. Its `pins` returns name →
content hash or version of what the field of a section, at the dotted key `place`, names.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.config.parts import installed_version, is_own, own_files, part_file

HashOf = Callable[[Path], str]
"""File → sha256."""
UNKNOWN = "not known: "
"""Prefix of pins that need a download or the Hub's answer first: such a key is preliminary."""


@dataclass(frozen=True)
class File:
    """Local files. They are named by place in the configuration, since they may move, and by suffix."""

    def pins(self, place: str, value: Any, section: Any, hash_of: HashOf) -> dict[str, str]:
        """Return the hash of each; an address is its own name, and its content is recorded after reading."""
        names = [value] if isinstance(value, str) else list(value or [])
        places = [place] if isinstance(value, str) else [f"{place}.{number}" for number in range(len(names))]
        return {
            f"file {at} ({Path(name).suffix})": hash_of(Path(name))
            for at, name in zip(places, names, strict=True)
            if "://" not in name
        }


@dataclass(frozen=True)
class Folder:
    """A local folder, of which all files count, wherever it is."""

    def pins(self, place: str, value: Any, section: Any, hash_of: HashOf) -> dict[str, str]:
        """Return the hash of each file in it."""
        if value is None:
            return {}
        files = sorted(path for path in Path(value).rglob("*") if path.is_file())
        if not files:
            raise FileNotFoundError(2, "no folder with files", value)
        return {f"file of folder {path.relative_to(value).as_posix()}": hash_of(path) for path in files}


@dataclass(frozen=True)
class Code:
    """A user's `module:name`, with all of the user's code that it imports. Ours is covered by the stages' versions."""

    def pins(self, place: str, value: Any, section: Any, hash_of: HashOf) -> dict[str, str]:
        """Return the hash of each of the user's files, and the versions of the packages that these import."""
        names = [value] if isinstance(value, str) else list((value or {}).values())
        found: dict[str, str] = {}
        for name in filter(is_own, names):
            part_file(name)
            found |= code_of_part(name, hash_of)
        return found


@dataclass(frozen=True)
class Found:
    """What a function of ours finds to be meant by the whole section, such as the commit of a branch."""

    by: str
    """module:function, called with section and hash function; returns the pins, or what identifies each thing."""

    def pins(self, place: str, value: Any, section: Any, hash_of: HashOf) -> dict[str, str]:
        """Return what the function finds."""
        module, _, name = self.by.partition(":")
        found = getattr(importlib.import_module(module), name)(section, hash_of)
        if isinstance(found, dict):
            return found
        return {f"contents {place}" + (f".{n}" if n else ""): each for n, each in enumerate(found)}


def code_of_part(name: str, hash_of: HashOf) -> dict[str, str]:
    """Return `code FILE` → digest of each file of a user's `module:name`, and `package NAME` → version."""
    module = name.partition(":")[0]
    files = find_own_files(own_files(module), None)
    found = {f"code {shown}": hash_of(file)[:16] for shown, file in files.values()}
    imported = {each for dotted, (_, file) in files.items() for each in _imports(dotted, file)} or {module}
    for top in sorted({each.partition(".")[0] for each in imported}):
        if (package := installed_version(top)) is not None:
            found[f"package {package[0]}"] = package[1]
    return found


def find_own_files(start: dict[str, Path], root: Path | None) -> dict[str, tuple[str, Path]]:
    """Return dotted name → (name for people, file) of a user's modules and of all of the user's that they import.

    Imports are found by parsing, without running the files, also inside functions.
    """
    found: dict[str, tuple[str, Path]] = {}
    waiting = dict(start)
    while waiting:
        dotted, file = waiting.popitem()
        shown = dotted.replace(".", "/") + ("/__init__.py" if file.name == "__init__.py" else ".py")
        found[dotted] = (shown, file)
        for imported in _imports(dotted, file):
            waiting |= {name: path for name, path in own_files(imported, root).items() if name not in found}
    return found


def _imports(dotted: str, file: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports; relative ones become absolute."""
    package = dotted if file.name == "__init__.py" else dotted.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield from (".".join(filter(None, [*above, node.module, alias.name])) for alias in node.names)
