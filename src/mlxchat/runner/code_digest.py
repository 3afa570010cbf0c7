"""Which code a stage runs: its own file and everything of mlxchat that it imports, as digests of what they compute.

Found by reading, never by importing: import statements anywhere in a file are followed, in functions too. What does not
compute is left out: the runner, the verbs, the report, and the schema, whose values are part of the identity anyway.
A digest does not change with comments, docstrings, layout, the place of the file or the version of Python.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxchat.runner.fingerprint import hash_code, strip_docstrings

_LIBRARY = "mlxchat"
# Parts of mlxchat that do not compute what ends in an artifact; schemas, whose names end in _config, do not either.
_LEFT_OUT = frozenset({
    "runner", "launch", "commands", "report", "bench", "sweep", "serve", "cli", "compose", "composed_cache", "missing",
    "validation", "misspelling", "trackers", "terminal_chat", "errors", "config", "conf", "stages", "__init__",
    "__main__",
})  # fmt: skip
# Written by the parser of some versions only, or without meaning for what is computed.
_IGNORED_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores", "type_params"})
_FORMAT = 1

Entry = dict[str, Any]
Modules = dict[str, tuple[str, str]]


def remembered() -> Path:
    """Return the file of what was read, for all outputs folders; another version of Python writes code otherwise."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "mlxchat" / f"code-{sys.version_info.major}.{sys.version_info.minor}.json"


def computes_nothing(part: str) -> bool:
    """Tell whether a module or package right under mlxchat has no part in what ends in an artifact."""
    return part in _LEFT_OUT or part.endswith("_config")


class CodeDigests:
    """Digests of source files, remembered in a file from one process to the next."""

    def __init__(self, cache: Path, library: Path) -> None:
        """Read what is remembered; a damaged cache counts for nothing.

        Args:
            cache: the file, in general `remembered()`.
            library: folder of the package mlxchat.
        """
        self._cache, self._library, self._changed = cache, library, False
        self._entries: dict[str, Entry] = {}
        self._seen: dict[str, Entry] = {}
        self._used: dict[str, list[tuple[str, str]]] = {}
        self._found: Modules | None = None
        with suppress(OSError, ValueError, AttributeError, TypeError):
            record = json.loads(cache.read_text(encoding="utf-8"))
            if record["format"] == _FORMAT:
                self._entries = {path: entry for path, entry in record["files"].items() if _is_entry(entry)}

    def of_stage(self, path: Path) -> dict[str, str]:
        """Return name → digest of a stage's file and of every module of mlxchat that it uses, sorted by name.

        Names are paths relative to the package, such as model/gpt.py; the stage's own is stages/<name>.py.
        """
        modules = self._modules() | {
            f"{path.parent.name}.{entry.name[:-3]}": (entry.path, f"stages/{entry.name}")
            for entry in _python_files(str(path.parent))
        }
        waiting, found = {str(path): f"stages/{path.name}"}, dict[str, str]()
        while waiting:
            file, name = waiting.popitem()
            found[name] = self._entry(file)["digest"]
            if file not in self._used:
                imports = self._entry(file)["imports"]
                self._used[file] = list({used for module in imports for used in _files_of(module, modules)})
            for used, called in self._used[file]:
                if called not in found:
                    waiting[used] = called
        return dict(sorted(found.items()))

    def of_file(self, path: Path) -> str:
        """Return the digest of one file by itself, as manifests have recorded it from the beginning."""
        entry = self._entry(str(path))
        if "alone" not in entry:
            entry["alone"], self._changed = hash_code(path), True
        return str(entry["alone"])

    def save(self) -> None:
        """Remember what was read; a cache that cannot be written is no fault."""
        if not self._changed:
            return
        temporary = self._cache.with_name(f".{self._cache.name}-{os.getpid()}")
        with suppress(OSError):
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            files = {path: entry for path, entry in self._entries.items() if Path(path).exists()}
            temporary.write_text(json.dumps({"format": _FORMAT, "files": files}), encoding="utf-8")
            temporary.replace(self._cache)
            self._changed = False

    def _entry(self, path: str) -> Entry:
        known = self._seen.get(path)
        if known is not None:
            return known
        status = os.stat(path)  # noqa: PTH116 (a hundred of these are in the way of a start that has nothing to do)
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = self._entries.get(path)
        if entry is None or entry["stamp"] != stamp:
            tree = ast.parse(Path(path).read_text(encoding="utf-8"))
            entry = {
                "stamp": stamp,
                "imports": sorted(set(_imports(tree))),
                "digest": hash_tree(strip_docstrings(tree)),
            }
            self._entries[path], self._changed = entry, True
        self._seen[path] = entry
        return entry

    def _modules(self) -> Modules:
        """Return dotted name → (file, name for people) of the modules of mlxchat that may compute."""
        if self._found is None:
            self._found = {}
            waiting = [(str(self._library), _LIBRARY, "")]
            while waiting:
                folder, dotted, prefix = waiting.pop()
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if prefix == "" and computes_nothing(entry.name.removesuffix(".py")):
                            continue
                        if entry.name.endswith(".py"):
                            module = dotted if entry.name == "__init__.py" else f"{dotted}.{entry.name[:-3]}"
                            self._found[module] = (entry.path, prefix + entry.name)
                        elif entry.is_dir() and entry.name != "__pycache__":
                            waiting.append((entry.path, f"{dotted}.{entry.name}", f"{prefix}{entry.name}/"))
        return self._found


def _files_of(module: str, modules: Modules) -> Iterator[tuple[str, str]]:
    """Yield the files behind a dotted name, the packages around it too; all of a package's where it ends in `.*`."""
    if module.endswith(".*"):
        yield from (found for name, found in modules.items() if name.rpartition(".")[0] == module[:-2])
        module = module[:-2]
    while module:
        if module in modules:
            yield modules[module]
        module = module.rpartition(".")[0]


def _python_files(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.name.endswith(".py") and entry.name != "__init__.py"]


def changed_modules(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the names of the modules whose digests differ, or that only one of both has."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def hash_tree(tree: ast.AST) -> str:
    """Return a digest of a syntax tree, 16 hex digits."""
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()[:16]


def _plain(node: Any) -> Any:
    """Return a tree as nested tuples, without positions and without what is empty, which versions add fields of."""
    if isinstance(node, ast.AST):
        values = ((name, getattr(node, name, None)) for name in node._fields if name not in _IGNORED_FIELDS)
        return (type(node).__name__, *((name, _plain(value)) for name, value in values if value not in (None, [])))
    if isinstance(node, list):
        return tuple(map(_plain, node))
    return (type(node).__name__, repr(node))


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a file may import, those of types alone left out; `package.*` for a computed name."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _last_name(node.func) == "import_module" and node.args:
            name = node.args[0]
            if isinstance(name, ast.JoinedStr) and isinstance(start := name.values[0], ast.Constant):
                yield f"{str(start.value).rstrip('.')}.*"
            elif isinstance(name, ast.Constant):
                yield str(name.value)
        waiting += ast.iter_child_nodes(node)


def _last_name(node: ast.expr) -> str | None:
    """Return c of `a.b.c` and of `c`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("stamp"), list)
        and isinstance(entry.get("digest"), str)
        and isinstance(entry.get("alone", ""), str)
        and isinstance(entry.get("imports"), list)
        and all(isinstance(name, str) for name in entry["imports"])
    )
