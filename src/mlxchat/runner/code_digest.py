"""Which code a stage or a user's part runs: the files that it imports, directly or not, and the data files beside them.

Found by reading, never by importing: import statements anywhere in a file are followed, in functions too, and so is
`with_name("NAME")`, by which a module names a data file, a folder of them or a script that stands beside it. What does
not compute is left out: the runner, the verbs, the report, and the schema, whose values are part of the identity
anyway.
The digest of a Python file does not change with comments, docstrings, layout, its place or the version of Python; that
of a data file is of its bytes.
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

from mlxchat.config.parts import installed_version, own_files
from mlxchat.store.fingerprint import hash_code, strip_docstrings

_LIBRARY = "mlxchat"
# Parts of mlxchat that do not compute what ends in an artifact.
_LEFT_OUT = frozenset({
    "runner", "store", "commands", "report", "bench", "sweep", "serve", "terminal", "cli", "composition", "trackers",
    "errors", "config", "conf", "stages", "__init__", "__main__",
})  # fmt: skip
# Written by the parser of some versions only, or without meaning for what is computed.
_IGNORED_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores", "type_params"})
_FORMAT = 3

Entry = dict[str, Any]
_Module = tuple[str, str, str]  # dotted name, file, name for people
Modules = dict[str, _Module]


def remembered() -> Path:
    """Return the file of what was read, for all outputs folders; another version of Python writes code otherwise."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "mlxchat" / f"code-{sys.version_info.major}.{sys.version_info.minor}.json"


def computes_nothing(part: str) -> bool:
    """Tell whether a module or package right under mlxchat has no part in what ends in an artifact."""
    return part in _LEFT_OUT


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
        self._used: dict[str, list[_Module]] = {}
        self._found: Modules | None = None
        with suppress(OSError, ValueError, AttributeError, TypeError):
            record = json.loads(cache.read_text(encoding="utf-8"))
            if record["format"] == _FORMAT:
                self._entries = {path: entry for path, entry in record["files"].items() if _is_entry(entry)}

    def of_stage(self, path: Path, module: str = "", root: Path | None = None) -> dict[str, str]:
        """Return name → digest of a stage's file and of every module and data file that it uses, sorted by name.

        Names are paths relative to the package, such as model/gpt.py; the stage's own is stages/<name>.py.

        Args:
            path: the stage's file.
            module: its dotted name, if it is a user's: then modules of the user's own are followed too.
            root: folder in which these are found; None: the current one.
        """
        used = self._closure([(module, str(path), f"stages/{path.name}")], root, self._modules())
        return dict(sorted((called, self._entry(file)["digest"]) for _, file, called in used))

    def of_part(self, name: str) -> dict[str, str]:
        """Return what the code of a user's `module:name` is, for a key.

        That is `code FILE` → digest of every file of the user's own that it uses, and `package NAME` → version of the
        installed packages that these import.
        """
        module = name.partition(":")[0]
        used = self._closure([_named(*each) for each in own_files(module).items()], None, {})
        found = {f"code {called}": self._entry(file)["digest"] for _, file, called in used}
        imported = [each for dotted, file, _ in used for each in self._imported(dotted, file)] or [module]
        for top in sorted({each.partition(".")[0] for each in imported}):
            if (package := installed_version(top)) is not None:
                found[f"package {package[0]}"] = package[1]
        return found

    def _closure(self, start: list[_Module], root: Path | None, ours: Modules) -> list[_Module]:
        """Return the modules of a start and all that they use, of `ours` and of the user's own."""
        waiting, found = {file: (dotted, file, called) for dotted, file, called in start}, dict[str, _Module]()
        while waiting:
            file, module = waiting.popitem()
            found[file] = module
            for used in self._uses(module, root, ours):
                if used[1] not in found:
                    waiting[used[1]] = used
        return list(found.values())

    def _uses(self, module: _Module, root: Path | None, ours: Modules) -> list[_Module]:
        """Return the modules that one imports; what ours import of others is installed."""
        dotted, file, _ = module
        if file not in self._used:
            imports = self._imported(dotted, file)
            found = {used for each in imports for used in _files_of(each, ours)}
            if dotted and dotted.partition(".")[0] != _LIBRARY:
                found |= {_named(*own) for each in imports for own in _own_files_of(each, root)}
            beside = self._entry(file)["beside"]
            self._used[file] = [*found, *(used for other in beside for used in _files_beside(module, other))]
        return self._used[file]

    def _imported(self, dotted: str, file: str) -> list[str]:
        """Return the dotted names that a module imports, relative ones made absolute."""
        package = dotted if file.endswith("/__init__.py") else dotted.rpartition(".")[0]
        imports = []
        for name in self._entry(file)["imports"]:
            level = len(name) - len(name.lstrip("."))
            above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
            imports.append(".".join([*above, name[level:]]))
        return imports

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
            content = Path(path).read_bytes()
            entry = {"stamp": stamp, "imports": [], "beside": [], "digest": hashlib.sha256(content).hexdigest()[:16]}
            if path.endswith(".py"):
                tree = ast.parse(content)
                entry |= {"imports": sorted(set(_imports(tree))), "beside": sorted(set(_named_beside(tree)))}
                entry["digest"] = hash_tree(strip_docstrings(tree))
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
                            self._found[module] = (module, entry.path, prefix + entry.name)
                        elif entry.is_dir() and entry.name != "__pycache__":
                            waiting.append((entry.path, f"{dotted}.{entry.name}", f"{prefix}{entry.name}/"))
        return self._found


def _files_of(module: str, ours: Modules) -> Iterator[_Module]:
    """Yield the files behind a dotted name, the packages around it too; all of a package's where it ends in `.*`."""
    if module.endswith(".*"):
        yield from (found for name, found in ours.items() if name.rpartition(".")[0] == module[:-2])
        module = module[:-2]
    while module:
        if module in ours:
            yield ours[module]
        module = module.rpartition(".")[0]


def _files_beside(module: _Module, other: str) -> Iterator[_Module]:
    """Yield the file `other` in the folder of a module, or all files of a folder so named; none if it is missing."""
    _, file, name = module
    place, called = Path(file).with_name(other), name.rpartition("/")[0]
    for path in [place, *(sorted(place.iterdir()) if place.is_dir() else [])]:
        if path.is_file():
            yield "", str(path), f"{called}/{path.relative_to(place.parent).as_posix()}".lstrip("/")


def _own_files_of(module: str, root: Path | None) -> Iterator[tuple[str, Path]]:
    """Yield dotted name and file of the user's own modules behind a dotted name, as `_files_of` those of ours."""
    package = module.removesuffix(".*")
    found = own_files(package, root)
    yield from found.items()
    if package != module and package in found:
        yield from ((f"{package}.{path.stem}", path) for path in found[package].parent.glob("[!_]*.py"))


def _named(dotted: str, file: Path) -> _Module:
    """Return a module of the user's own with its name for people: helper.py, words/count.py."""
    path = dotted.replace(".", "/")
    return dotted, str(file), f"{path}/__init__.py" if file.name == "__init__.py" else f"{path}.py"


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
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (f"{node.module}." if node.module else "")
            yield from (f"{package}{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _last_name(node.func) == "import_module" and node.args:
            name = node.args[0]
            if isinstance(name, ast.JoinedStr) and isinstance(start := name.values[0], ast.Constant):
                yield f"{str(start.value).rstrip('.')}.*"
            elif isinstance(name, ast.Constant):
                yield str(name.value)
        waiting += ast.iter_child_nodes(node)


def _named_beside(tree: ast.AST) -> Iterator[str]:
    """Yield the literal names in `with_name("NAME")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _last_name(node.func) == "with_name":
            yield from (str(name.value) for name in node.args if isinstance(name, ast.Constant))


def _last_name(node: ast.expr) -> str | None:
    """Return c of `a.b.c` and of `c`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("stamp"), list)
        and isinstance(entry.get("digest"), str)
        and isinstance(entry.get("alone", ""), str)
        and all(isinstance(entry.get(key), list) for key in ("imports", "beside"))
        and all(isinstance(name, str) for name in [*entry["imports"], *entry["beside"]])
    )
