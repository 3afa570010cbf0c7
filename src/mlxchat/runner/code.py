"""Digests of code: of the package as a whole, of a stage's file, and of every file that a user's part imports.

Imports of users' files are found by parsing, without running them, also inside functions. The digests are of bytes.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mlxchat.config.parts import installed_version, own_files
from mlxchat.store.fingerprint import hash_file

PACKAGE = "mlxchat"
# Parts of the package that do not affect artifacts.
_LEFT_OUT = frozenset({
    "runner", "store", "commands", "report", "bench", "sweep", "serve", "terminal", "cli", "composition", "trackers",
    "errors", "config", "conf", "stages", "__init__", "__main__",
})  # fmt: skip


@cache
def package_digest(library: Path | None = None) -> str:
    """Return the digest of all files of the package that affect artifacts, 16 hex digits.

    Args:
        library: folder of the package; None: this one.
    """
    root = library or Path(__file__).parents[1]
    content = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and "__pycache__" not in name.parts and name.parts[0].removesuffix(".py") not in _LEFT_OUT:
            content.update(f"{name.as_posix()}\n{hash_file(path)}\n".encode())
    return content.hexdigest()[:16]


def code_of_stage(path: Path, module: str = "", root: Path | None = None) -> dict[str, str]:
    """Return name → digest of the code that a stage runs: the package, its file, and a user's stage's own imports.

    Args:
        path: the stage's file.
        module: dotted name of a user's stage; "": one of ours.
        root: folder of the user's modules; None: the current one.
    """
    own = _closure({module: path}, root) if module else {}
    own.pop(module, None)
    files = {f"stages/{path.name}": path, **{_shown(dotted, file): file for dotted, file in own.items()}}
    return {PACKAGE: package_digest(), **{name: hash_file(file)[:16] for name, file in sorted(files.items())}}


def code_of_part(name: str) -> dict[str, str]:
    """Return the identity of the code of a user's `module:name`, for a key.

    `code FILE` → digest of each of the user's files that it imports, and `package NAME` → version of the installed
    packages that these import.
    """
    module = name.partition(":")[0]
    files = _closure(own_files(module), None)
    found = {f"code {_shown(dotted, file)}": hash_file(file)[:16] for dotted, file in files.items()}
    imported = {each for dotted, file in files.items() for each in _imports(dotted, file)} or {module}
    for top in sorted({each.partition(".")[0] for each in imported}):
        if (package := installed_version(top)) is not None:
            found[f"package {package[0]}"] = package[1]
    return found


def changed_code(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the names with different digests, or that only one side has."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _closure(start: dict[str, Path], root: Path | None) -> dict[str, Path]:
    """Return dotted name → file of a user's modules and of all of the user's modules that they import."""
    found: dict[str, Path] = {}
    waiting = dict(start)
    while waiting:
        dotted, file = waiting.popitem()
        found[dotted] = file
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


def _shown(dotted: str, file: Path) -> str:
    """Return a module's name for people: helper.py, words/count.py."""
    path = dotted.replace(".", "/")
    return f"{path}/__init__.py" if file.name == "__init__.py" else f"{path}.py"
