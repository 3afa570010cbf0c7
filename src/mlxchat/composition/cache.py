"""Cache of composed configurations, so that repeated commands skip Hydra.

Each command line has one file in the user's cache folder. Its name is a hash of the overrides and of (path, size,
mtime_ns, inode) of everything that composing reads: every searched YAML, the schema's source, Hydra and OmegaConf.
A configuration is not cached if it uses resolvers such as `${oc.env:…}` or settings of Hydra, if a file changed within
the last seconds, or if it does not load back exactly equal. Damaged entries are ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mlxchat.config.schema import Config
from mlxchat.config.secrets import redact
from mlxchat.store.files import read_cache, write_cache
from mlxchat.store.fingerprint import plain_of

_KIND = "composed 3"
_MOST_ENTRIES = 200
_MOST_FILES = 2000
# A file may change twice within this time and keep its mtime.
_SETTLED_SECONDS = 2.0
_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:|searchpath")

Stamp = tuple[str, int, int, int]


class ComposedCache:
    """The entry of one command line."""

    def __init__(self, overrides: list[str], config_dirs: list[str], conf: Path, schema: type[Config] = Config) -> None:
        """Stamp the files that composing would read; `conf` is the folder with the built-in YAML."""
        self._schema = schema
        self._own, self._folders = [Path(folder) for folder in config_dirs], [conf, *map(Path, config_dirs)]
        self._entry: Path | None = None
        if os.environ.get("MLXCHAT_COMPOSED_CACHE") == "off" or any(map(_is_unsteady, overrides)):
            return
        try:
            self._stamps = _stamp_all(self._folders, schema)
        except OSError:
            return
        if len(self._stamps) > _MOST_FILES:
            return
        sections = [item.name for item in fields(schema)]
        key = json.dumps([_KIND, sys.version, overrides, config_dirs, sections, self._stamps])
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._entry = home / "mlxchat" / "composed" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def recall(self) -> tuple[Config, dict[str, str]] | None:
        """Return the cached configuration and group → option; None if there is none."""
        if self._entry is None:
            return None
        try:
            record = read_cache(self._entry, _KIND)
            if any(_stamps_in(folder) != stamps for folder, stamps in record["packages"].items()):
                return None
            return restore(self._schema, record["config"]), record["choices"]
        except (KeyError, TypeError):  # there is no entry, or a damaged one
            return None

    def keep(self, config: Config, choices: dict[str, str], packages: Iterable[str] = ()) -> None:
        """Cache a composed configuration if composing it again is certain to give the same result.

        Args:
            config: the composed configuration.
            choices: group → chosen option.
            packages: folders that packages added to the search path of YAML files.
        """
        if self._entry is None or self._is_changing() or any(map(_has_resolver, self._own)):
            return
        plain = {
            "config": plain_of(config),
            "choices": choices,
            "packages": {folder: _stamps_in(folder) for folder in packages},
        }
        if redact(plain) != plain:  # secrets are never written
            return
        # repr distinguishes 1, 1.0 and True, which compare equal.
        if repr(restore(self._schema, json.loads(json.dumps(plain))["config"])) != repr(config):
            return
        with contextlib.suppress(OSError):
            self._entry.parent.mkdir(parents=True, exist_ok=True)
            write_cache(self._entry, _KIND, plain)
            entries = sorted(self._entry.parent.iterdir(), key=lambda entry: entry.stat().st_mtime)
            for entry in entries[:-_MOST_ENTRIES]:
                entry.unlink(missing_ok=True)

    def _is_changing(self) -> bool:
        """Return True if a file changed just now, or since it was stamped."""
        newest = max(stamp[2] for stamp in self._stamps) / 1e9
        return newest > time.time() - _SETTLED_SECONDS or _stamp_all(self._folders, self._schema) != self._stamps


def _is_unsteady(override: str) -> bool:
    """Return True for an override of Hydra's settings, or one whose value may differ next time."""
    return override.lstrip("+~").startswith("hydra") or _RESOLVER.search(override) is not None


def _has_resolver(folder: Path) -> bool:
    files = (Path(stamp[0]) for stamp in stamp_folder(folder))
    return any(_RESOLVER.search(path.read_text(encoding="utf-8", errors="replace")) for path in files)


def _stamp_all(folders: list[Path], schema: type[Config]) -> list[Stamp]:
    stamps = [stamp for folder in folders for stamp in stamp_folder(folder)]
    sources = sorted(map(str, Path(__file__).parent.glob("*.py")))
    sources += _own_sources(schema)
    plugins = find_spec("hydra_plugins")
    sources += plugins.submodule_search_locations or [] if plugins else []  # plugins may add folders of YAML files
    for package, name in (("hydra", "__init__.py"), ("omegaconf", "version.py")):  # contain their versions
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        sources.append(str(Path(spec.origin).with_name(name)))
    return stamps + [_stamp(path) for path in sources]


def _own_sources(schema: type[Config]) -> list[str]:
    """Return the files of the modules that declare own sections, and of all loaded modules of their packages."""
    packages = {item.type.__module__.partition(".")[0] for item in fields(schema) if isinstance(item.type, type)}
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in packages - {"builtins"}]
    return sorted({file for module in modules if (file := getattr(module, "__file__", None))})


def stamp_folder(folder: Path) -> list[Stamp]:
    """Return (path, size, mtime_ns, inode) of every YAML file below a folder."""
    found = []
    for place, below, names in os.walk(folder, followlinks=True):
        below.sort()
        found += [_stamp(f"{place}/{name}") for name in sorted(names) if name.endswith((".yaml", ".yml"))]
        if len(found) > _MOST_FILES:
            break
    return found


def _stamps_in(folder: str) -> list[list[Any]]:
    """Return the stamps of a folder's YAML files in the types that JSON loads."""
    return [list(stamp) for stamp in stamp_folder(Path(folder))]


def _stamp(path: str) -> Stamp:
    status = Path(path).stat()
    return (path, status.st_size, status.st_mtime_ns, status.st_ino)


def restore(hint: Any, value: Any) -> Any:
    """Return plain data converted to a type that a field of the schema declares."""
    origin, arguments = get_origin(hint), get_args(hint)
    if value is None:
        return None
    if origin in (Union, UnionType):
        (kind, *others) = [argument for argument in arguments if argument is not type(None)]
        return value if others else restore(kind, value)
    if origin is dict:
        return {key: restore(arguments[1], item) for key, item in value.items()}
    if origin is list:
        return [restore(arguments[0], item) for item in value]
    if hasattr(hint, "__dataclass_fields__"):
        hints = get_type_hints(hint)
        return hint(**{key: restore(hints[key], item) for key, item in value.items()})
    return value
