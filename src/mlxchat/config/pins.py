"""What settings refer to: users' own parts by `module:name`, and external data, which a step's key pins.

Parts are rewards, tasks, evaluations, trackers and stages, in the current folder or installed. Of external data, and of
the users' code, the key holds the contents or the version.

A field's metadata has one of these: `field(default="poem.txt", metadata={"pin": File()})`. Its `pins` returns name →
content hash or version of what the field of a section, at the dotted key `place`, names.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError

_INSTALLED = {"site-packages", "dist-packages"}


def is_own(name: str) -> bool:
    """Return True if a part's name in the configuration is `module:name` instead of one of ours."""
    return ":" in name


def load_part(name: str) -> Callable[..., Any]:
    """Import and return the class or function that `module:name` names; ConfigError if there is none."""
    part_file(name)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module, Path.cwd()), attribute)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{name}: importing it failed ({type(error).__name__}: {error})") from None
    if not callable(found):
        raise ConfigError(f"{name} cannot be called")
    part: Callable[..., Any] = found
    return part


def part_file(name: str) -> Path:
    """Return the file of the module in `module:name` without importing it; ConfigError if there is none."""
    module = name.partition(":")[0]
    if (file := module_files(module).get(module)) is None:
        form = "expected module:name, such as rewards:brevity for brevity in rewards.py"
        raise ConfigError(f"{name}: there is no module {module}, neither in {Path.cwd()} nor installed; {form}")
    return file


def import_module(module: str, root: Path | None = None) -> Any:
    """Import a module, searching the folder `root` first; None: installed modules only."""
    with nullcontext() if root is None else _on_path(root):
        return importlib.import_module(module)


def module_files(module: str, root: Path | None = None) -> dict[str, Path]:
    """Return dotted name → file of a module and its parent packages, without importing any of them.

    Names after the last module are ignored, so `rewards.brevity` gives rewards.py.
    """
    found: dict[str, Path] = {}
    place, name = None, ""
    with _on_path(root):
        for part in module.split("."):
            name = f"{name}.{part}" if name else part
            spec = PathFinder.find_spec(name, place)
            if spec is None and place is None:
                with suppress(ValueError):
                    spec = importlib.util.find_spec(name)  # editable installs use other finders
            if spec is None:
                break
            if spec.origin is not None and spec.origin.endswith(".py"):
                found[name] = Path(spec.origin)
            place = spec.submodule_search_locations
            if place is None:
                break
    return found


def own_files(module: str, root: Path | None = None) -> dict[str, Path]:
    """Return `module_files` of a user's module; nothing for modules of Python, of mlxchat and installed ones."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "mlxchat":
        return {}
    found = module_files(module, root)
    return {} if any(_INSTALLED & {*path.parts} for path in found.values()) else found


def installed_version(module: str) -> tuple[str, str] | None:
    """Return name and version of a module's installed package; None for modules of Python, mlxchat and the user."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "mlxchat" or own_files(top):
        return None
    import importlib.metadata  # slow to import

    try:
        return top, importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:  # the package's name may differ from the module's
        names = importlib.metadata.packages_distributions().get(top, [])
        return (names[0], importlib.metadata.version(names[0])) if names else None


@contextmanager
def _on_path(root: Path | None) -> Iterator[None]:
    """Search a folder first; afterwards, for imports inside functions, last."""
    folder = str(Path.cwd() if root is None else root)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


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
