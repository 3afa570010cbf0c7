"""The parts of a key other than settings: pins of external data, and digests of code.

Data files, packages and users' code are pinned by content or version before a step runs and checked again after it.

Code is found by parsing, without imports: import statements are followed, also inside functions, and so is
`with_name("NAME")`, which names a data file, folder or script next to a module. Modules that do not compute are
excluded: the runner, the verbs, the report, and the schema, whose values are in the key anyway. The digest of a Python
file ignores comments, docstrings, layout, location and the version of Python; that of a data file covers its bytes.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import importlib
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from mlxchat.config.parts import installed_version, is_own, own_files, part_file
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.store.files import read_cache, write_cache
from mlxchat.store.fingerprint import hash_file, is_identity

UNKNOWN = "not known: "
"""Prefix of pins that need a download or the Hub's answer first: such a key is preliminary."""
# A recently changed file may change again with the same mtime, so its hash is not cached yet.
_SETTLED_NANOSECONDS = 2_000_000_000


class FileCache:
    """Cache of values computed from files' bytes, valid while size, times and inode stay the same."""

    def __init__(self, place: Path, kind: str, read: Callable[[Path], Any]) -> None:
        """Load the cache of this kind (name and format version) from the file `place`."""
        self._place, self._kind, self._read, self._changed = place, kind, read, False
        self._known = read_cache(place, kind)
        self._seen: dict[str, Any] = {}

    def of(self, path: str) -> Any:
        """Return the value of the file at an absolute path; each file is examined once.

        Raises:
            OSError: it cannot be read.
        """
        if path not in self._seen:
            status = os.stat(path)  # noqa: PTH116  (a hundred of these at every start)
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            before, found = self._known.get(path, (None, None))
            if before != stamp:
                found = self._read(Path(path))
                if time.time_ns() - max(stamp[1], stamp[2]) > _SETTLED_NANOSECONDS:
                    self._known[path], self._changed = [stamp, found], True
            self._seen[path] = found
        return self._seen[path]

    def save(self) -> None:
        """Save the cache without files that are gone; failing to write it is no error."""
        if self._changed:
            kept = {path: known for path, known in self._known.items() if Path(path).exists()}
            write_cache(self._place, self._kind, kept)
            self._changed = False


def file_hashes(outputs: Path) -> FileCache:
    """Return sha256 digests of outside files, cached so that planning reads large texts once."""
    return FileCache(outputs / "index" / "files.json", "files 1", hash_file)


def check_pins(
    step: str, pins: Mapping[str, str], sections: Mapping[str, Any], when: str, unread: Container[str] = ()
) -> None:
    """Hash a step's external data again, and refuse if it is not what the step's key was made from.

    Args:
        step: name of the step.
        pins: name → hash, which `pin_externals` returned when the step was planned.
        sections: sections of the configuration.
        when: time of the change, for the message: "since it was planned", "while it was read".
        unread: sections and settings to skip.

    Raises:
        StepFailed: names the data that changed; the step's result must not be published under its key.
    """
    try:
        now = pin_externals(sections, unread=unread)
    except ConfigError as error:
        raise StepFailed(f"step {step}: {error}") from None
    changed = [name for name in pins.keys() | now.keys() if pins.get(name) != now.get(name)]
    if changed:
        names = ", ".join(sorted(name.partition(" ")[2] for name in changed))
        raise StepFailed(
            f"step {step}: {names} changed {when}. Nothing was published, since it would not be what its id says. "
            "Run the same command again when it no longer changes."
        )


def pin_externals(
    sections: Mapping[str, Any], hash_of: Callable[[Path], str] = hash_file, unread: Container[str] = ()
) -> dict[str, str]:
    """Return name → content hash or version of all external data that the config refers to.

    Fields whose metadata says `external: file` hold paths, those with `external: folder` a folder of which all files
    count, also in what it contains, those with `external: package` names of packages, and those with `external: code`
    a user's module:name, of which all code counts that it uses. One with `external: section` has the whole section it
    stands in pinned by the function (module:function of mlxchat's) that its metadata names under `by`; with
    `external: contents` that function returns what identifies each thing that the section refers to, or UNKNOWN and
    its name. One with `external: source` holds its `since_default` (nothing outside), a word that `packages`
    translates, a file, or a folder of which the files named in `folder` count.

    Args:
        sections: sections of the configuration.
        hash_of: hash function of files.
        unread: sections and settings to skip.

    Raises:
        ConfigError: lists every unreadable file and every missing package.
    """
    pins: dict[str, str] = {}
    problems: list[str] = []

    def visit(where: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                visit(f"{where}.{key}", item)
        for field in fields(value) if is_dataclass(value) else ():
            place, item, metadata = f"{where}.{field.name}", getattr(value, field.name), field.metadata
            kind = metadata.get("external")
            if place in unread:
                continue
            if kind is None:
                if is_identity(field):  # settings that change no result have no pins
                    visit(place, item)
                continue
            if kind == "section":
                pins.update(_call(metadata["by"], value, hash_of))
                continue
            if kind == "source":
                kind, item = _resolve_source(item, metadata)
            listed = item.values() if isinstance(item, Mapping) else item or []
            named = {place: item} if isinstance(item, str) else {f"{place}.{n}": name for n, name in enumerate(listed)}
            for at, name in named.items() if kind != "contents" else [(place, item)]:
                try:
                    if kind == "contents":
                        found = _call(metadata["by"], value, hash_of)
                        pins.update({f"contents {at}" + (f".{n}" if n else ""): each for n, each in enumerate(found)})
                    else:
                        pins.update(_pin(kind, at, name, hash_of))
                except ConfigError as error:
                    problems.append(f"{place}: {error}")
                except OSError as error:
                    problems.append(f"{place}: {name} cannot be read ({error.strerror})")
                except importlib.metadata.PackageNotFoundError:
                    problems.append(f"{place}: package {name} is missing: pip install {name}")

    for section, value in sections.items():
        if section not in unread:
            visit(section, value)
    if problems:
        raise ConfigError("\n".join(problems))
    return pins


def find_unknown(pins: Mapping[str, str]) -> dict[str, str]:
    """Return place in the configuration → description of the pins that are still unknown."""
    return {
        name.partition(" ")[2]: value.removeprefix(UNKNOWN) for name, value in pins.items() if value.startswith(UNKNOWN)
    }


def _call(function: str, section: Any, hash_of: Callable[[Path], str]) -> Any:
    """Call the function that the schema names to find what a section refers to."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(section, hash_of)


def _pin(kind: str, place: str, name: str, hash_of: Callable[[Path], str]) -> dict[str, str]:
    """Return the pins of one name at a place in the configuration."""
    if kind == "folder":
        return _folder_pins(Path(name), hash_of)
    if kind == "package":
        return {f"package {name}": importlib.metadata.version(name)}
    if kind == "code":
        if not is_own(name):
            return {}  # our tasks are covered by the stage's VERSION
        part_file(name)
        digests = CodeDigests()
        found = digests.of_part(name)
        digests.save()
        return found
    if "://" in name:
        return {}  # a URL is its own name; its content is recorded after reading
    # Named by the place in the configuration, since the file may move, and its suffix, which decides how it is read.
    return {f"file {place} ({Path(name).suffix})": hash_of(Path(name))}


def _folder_pins(folder: Path, hash_of: Callable[[Path], str]) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        raise OSError(errno.ENOENT, "no folder with files")
    return {f"file of folder {path.relative_to(folder).as_posix()}": hash_of(path) for path in files}


def _resolve_source(item: str, metadata: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return what a field with `external: source` refers to: "package" or "file", and the names."""
    if item == metadata["since_default"]:
        return "file", []
    if item in metadata["packages"]:
        return "package", [metadata["packages"][item]]
    if Path(item).is_dir():
        found = [str(path) for name in metadata["folder"] if (path := Path(item) / name).exists()]
        return "file", found or [item]
    return "file", [item]


_LIBRARY = "mlxchat"
# Parts of mlxchat that do not affect artifacts.
_LEFT_OUT = frozenset({
    "runner", "store", "commands", "report", "bench", "sweep", "serve", "terminal", "cli", "composition", "trackers",
    "errors", "config", "conf", "stages", "__init__", "__main__",
})  # fmt: skip
# Fields of syntax trees that only some versions of Python have, or that have no effect.
_IGNORED_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores", "type_params"})
_Module = tuple[str, str, str]  # dotted name, file, display name
_Modules = dict[str, _Module]


def computes_nothing(part: str) -> bool:
    """Return True if a module or package directly below mlxchat does not affect artifacts."""
    return part in _LEFT_OUT


class CodeDigests:
    """Digests of source files, cached in a file for all outputs folders."""

    def __init__(self, cache: Path | None = None, library: Path | None = None) -> None:
        """Load the cache.

        Args:
            cache: the cache file; None: in the user's cache folder.
            library: folder of the package mlxchat; None: this package.
        """
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # Syntax trees differ between versions of Python.
        self._cache = cache or home / "mlxchat" / f"code-{sys.version_info.major}.{sys.version_info.minor}.json"
        self._library = library or Path(__file__).parents[1]
        self._files = FileCache(self._cache, "code 4", _read_code)
        self._used: dict[str, list[_Module]] = {}
        self._found: _Modules | None = None

    def of_stage(self, path: Path, module: str = "", root: Path | None = None) -> dict[str, str]:
        """Return name → digest of a stage's file and of every module and data file that it uses, sorted by name.

        Names are paths relative to the package, such as model/gpt.py; the stage's own is stages/<name>.py.

        Args:
            path: the stage's file.
            module: dotted name of a user's stage, whose own imports are followed too.
            root: folder of the user's modules; None: the current one.
        """
        used = self._closure([(module, str(path), f"stages/{path.name}")], root, self._modules())
        return dict(sorted((called, self._files.of(file)["digest"]) for _, file, called in used))

    def of_part(self, name: str) -> dict[str, str]:
        """Return the identity of the code of a user's `module:name`, for a key.

        `code FILE` → digest of each of the user's files that it uses, and `package NAME` → version of the installed
        packages that they import.
        """
        module = name.partition(":")[0]
        used = self._closure([_named(*each) for each in own_files(module).items()], None, {})
        found = {f"code {called}": self._files.of(file)["digest"] for _, file, called in used}
        imported = [each for dotted, file, _ in used for each in self._imported(dotted, file)] or [module]
        for top in sorted({each.partition(".")[0] for each in imported}):
            if (package := installed_version(top)) is not None:
                found[f"package {package[0]}"] = package[1]
        return found

    def _closure(self, start: list[_Module], root: Path | None, ours: _Modules) -> list[_Module]:
        """Return the closure of modules that a start uses, from `ours` and from the user's."""
        waiting, found = {file: (dotted, file, called) for dotted, file, called in start}, dict[str, _Module]()
        while waiting:
            file, module = waiting.popitem()
            found[file] = module
            for used in self._uses(module, root, ours):
                if used[1] not in found:
                    waiting[used[1]] = used
        return list(found.values())

    def _uses(self, module: _Module, root: Path | None, ours: _Modules) -> list[_Module]:
        """Return the modules that a module imports; imports of our modules that are not ours are installed packages."""
        dotted, file, _ = module
        if file not in self._used:
            imports = self._imported(dotted, file)
            found = {used for each in imports for used in _files_of(each, ours)}
            if dotted and dotted.partition(".")[0] != _LIBRARY:
                found |= {_named(*own) for each in imports for own in _own_files_of(each, root)}
            beside = self._files.of(file)["beside"]
            self._used[file] = [*found, *(used for other in beside for used in _files_beside(module, other))]
        return self._used[file]

    def _imported(self, dotted: str, file: str) -> list[str]:
        """Return the dotted names that a module imports; relative ones become absolute."""
        package = dotted if file.endswith("/__init__.py") else dotted.rpartition(".")[0]
        imports = []
        for name in self._files.of(file)["imports"]:
            level = len(name) - len(name.lstrip("."))
            above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
            imports.append(".".join([*above, name[level:]]))
        return imports

    def save(self) -> None:
        """Save the cache for the next process."""
        with suppress(OSError):
            self._cache.parent.mkdir(parents=True, exist_ok=True)
        self._files.save()

    def _modules(self) -> _Modules:
        """Return dotted name → (file, display name) of the modules of mlxchat that affect artifacts."""
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


def _files_of(module: str, ours: _Modules) -> Iterator[_Module]:
    """Yield the files of a dotted name and its parent packages; all files of a package if it ends in `.*`."""
    if module.endswith(".*"):
        yield from (found for name, found in ours.items() if name.rpartition(".")[0] == module[:-2])
        module = module[:-2]
    while module:
        if module in ours:
            yield ours[module]
        module = module.rpartition(".")[0]


def _files_beside(module: _Module, other: str) -> Iterator[_Module]:
    """Yield the file `other` in a module's folder, or all files of such a folder; nothing if it is missing."""
    _, file, name = module
    place, called = Path(file).with_name(other), name.rpartition("/")[0]
    for path in [place, *(sorted(place.iterdir()) if place.is_dir() else [])]:
        if path.is_file():
            yield "", str(path), f"{called}/{path.relative_to(place.parent).as_posix()}".lstrip("/")


def _own_files_of(module: str, root: Path | None) -> Iterator[tuple[str, Path]]:
    """Yield dotted name and file of the user's modules behind a dotted name."""
    package = module.removesuffix(".*")
    found = own_files(package, root)
    yield from found.items()
    if package != module and package in found:
        yield from ((f"{package}.{path.stem}", path) for path in found[package].parent.glob("[!_]*.py"))


def _named(dotted: str, file: Path) -> _Module:
    """Return a user's module with its display name: helper.py, words/count.py."""
    path = dotted.replace(".", "/")
    return dotted, str(file), f"{path}/__init__.py" if file.name == "__init__.py" else f"{path}.py"


def changed_modules(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the names of modules with different digests, or that only one side has."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _read_code(path: Path) -> dict[str, Any]:
    """Return a file's digest and, for Python, the dotted names that it imports and the files that it names."""
    content = path.read_bytes()
    if path.suffix != ".py":
        return {"imports": [], "beside": [], "digest": hashlib.sha256(content).hexdigest()[:16]}
    tree = ast.parse(content)
    found = {"imports": sorted(set(_imports(tree))), "beside": sorted(set(_named_beside(tree)))}
    return {**found, "digest": hash_tree(_strip_docstrings(tree))}


def _strip_docstrings(tree: ast.Module) -> ast.Module:
    """Remove docstrings from a syntax tree, in place; return it."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
    return tree


def hash_tree(tree: ast.AST) -> str:
    """Return the digest of a syntax tree, 16 hex digits."""
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()[:16]


def _plain(node: Any) -> Any:
    """Return a tree as nested tuples, without positions and empty fields, which depend on the version of Python."""
    if isinstance(node, ast.AST):
        values = ((name, getattr(node, name, None)) for name in node._fields if name not in _IGNORED_FIELDS)
        return (type(node).__name__, *((name, _plain(value)) for name, value in values if value not in (None, [])))
    if isinstance(node, list):
        return tuple(map(_plain, node))
    return (type(node).__name__, repr(node))


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a file may import, except type-only imports; `package.*` for a computed name."""
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
