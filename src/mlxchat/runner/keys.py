"""Pins of external data, the part of a key that is not in the settings.

Data files, packages and users' code are pinned by content or version before a step runs and checked again after it.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from mlxchat.config.parts import is_own, part_file
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.runner.code import code_of_part
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
        return code_of_part(name)
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
