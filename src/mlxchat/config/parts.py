"""Finds users' own parts by name: `module:Class` or `module:function`, in the current folder or installed.

Parts are rewards, tasks, evaluations, trackers and stages.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
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
