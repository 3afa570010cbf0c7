"""What a step reads from outside the store: pinned by content or version before it runs, looked at again after it."""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from mlxchat.config.parts import is_own, part_file
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.runner.code_digest import CodeDigests, remembered
from mlxchat.store.fingerprint import hash_file

UNKNOWN = "not known: "
"""Begins the pin of what can be pinned only once it was fetched or the Hub answers: its key is not final."""
# A file that was changed a moment ago may change again without its time moving on: its hash is not remembered yet.
_SETTLED_NANOSECONDS = 2_000_000_000


class FileHashes:
    """Hashes of outside files, remembered by path, size, time and inode, so that planning reads a large text once."""

    def __init__(self, cache: Path) -> None:
        """Read what is remembered; a damaged cache counts for nothing."""
        self._cache, self._changed = cache, False
        self._known: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError):
            record = json.loads(cache.read_text(encoding="utf-8"))
            if isinstance(record, dict):
                self._known = record

    def of(self, path: Path) -> str:
        """Return the sha256 of a file, in hex.

        Raises:
            OSError: it cannot be read.
        """
        place, status = str(path.resolve()), path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._known.get(place)
        if isinstance(known, list) and len(known) == 5 and known[:4] == stamp and isinstance(known[4], str):
            return known[4]
        digest = hash_file(path)
        if time.time_ns() - max(stamp[1], stamp[2]) > _SETTLED_NANOSECONDS:
            self._known[place], self._changed = [*stamp, digest], True
        return digest

    def save(self) -> None:
        """Remember what was hashed, unless there is no outputs folder yet; that it cannot be written is no fault."""
        if self._changed and self._cache.parent.parent.is_dir():
            temporary = self._cache.with_name(f".{self._cache.name}-{os.getpid()}")
            with suppress(OSError):
                self._cache.parent.mkdir(exist_ok=True)
                temporary.write_text(json.dumps(self._known), encoding="utf-8")
                temporary.replace(self._cache)


def check_pins(
    step: str, pins: Mapping[str, str], sections: Mapping[str, Any], when: str, unread: Container[str] = ()
) -> None:
    """Hash everything outside anew, and compare it with what the step's id says.

    Args:
        step: its name.
        pins: `pin_externals` of the plan.
        sections: of the configuration, as for `pin_externals`.
        when: what happened since the plan, for the message: "since it was planned", "while it was read".
        unread: as for `pin_externals`.

    Raises:
        StepFailed: naming what changed; what was made of it must not be published under that id.
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
    """Return name → content hash or version of everything outside the store that the config refers to.

    Fields whose metadata says `external: file` hold paths, those with `external: folder` a folder of which all files
    count, also in what it contains, those with `external: package` names of packages, and those with `external: code`
    a user's module:name, of which all code counts that it uses. One with `external: section` has the whole section it
    stands in pinned by the function (module:function of mlxchat's) that its metadata names under `by`; with
    `external: contents` that function returns what identifies each thing that the section refers to, or UNKNOWN and
    its name. One with `external: source` holds its `since_default` (nothing outside), a word that `packages`
    translates, a file, or a folder of which the files named in `folder` count.

    Args:
        sections: of the configuration.
        hash_of: how files are hashed.
        unread: sections and settings that are left out.

    Raises:
        ConfigError: listing every file that cannot be read and every package that is not installed.
    """
    pins: dict[str, str] = {}
    problems: list[str] = []

    def visit(where: str, value: Any) -> None:
        if is_dataclass(value):
            for field in fields(value):
                place = f"{where}.{field.name}"
                if place in unread:
                    continue
                item, kind = getattr(value, field.name), field.metadata.get("external")
                if kind == "source":
                    kind, item = _resolve_source(item, field.metadata)
                if kind == "section":
                    pins.update(_call(field.metadata["by"], value, hash_of))
                    continue
                if kind == "contents":
                    try:
                        for number, content in enumerate(_call(field.metadata["by"], value, hash_of)):
                            pins[f"contents {place}" + (f".{number}" if number else "")] = content
                    except ConfigError as error:
                        problems.append(f"{place}: {error}")
                    except OSError as error:
                        problems.append(f"{place}: {item} cannot be read ({error.strerror})")
                    continue
                if kind is None:
                    if field.metadata.get("identity") is not False:  # what is only looked at changes no result
                        visit(place, item)
                    continue
                item = list(item.values()) if isinstance(item, Mapping) else item
                for number, name in enumerate([item] if isinstance(item, str) else item or []):
                    if kind == "file" and "://" in name:
                        continue  # a URL is its own name; what was there is recorded once it was read
                    try:
                        if kind == "folder":
                            pins.update(_folder_pins(Path(name), hash_of))
                        elif kind == "file":
                            # By its place in the configuration: it may be moved. How it is read depends on its ending.
                            index = "" if isinstance(item, str) else f".{number}"
                            pins[f"file {place}{index} ({Path(name).suffix})"] = hash_of(Path(name))
                        elif kind == "code":
                            pins.update(_code_pins(name))
                        else:
                            pins[f"package {name}"] = importlib.metadata.version(name)
                    except ConfigError as error:
                        problems.append(f"{place}: {error}")
                    except OSError as error:
                        problems.append(f"{place}: {name} cannot be read ({error.strerror})")
                    except importlib.metadata.PackageNotFoundError:
                        problems.append(f"{place}: package {name} is missing: pip install {name}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(f"{where}.{key}", item)

    for section, value in sections.items():
        if section not in unread:
            visit(section, value)
    if problems:
        raise ConfigError("\n".join(problems))
    return pins


def find_unknown(pins: Mapping[str, str]) -> dict[str, str]:
    """Return place in the configuration → what it refers to, of the pins whose contents are not known."""
    return {
        name.partition(" ")[2]: value.removeprefix(UNKNOWN) for name, value in pins.items() if value.startswith(UNKNOWN)
    }


def _call(function: str, section: Any, hash_of: Callable[[Path], str]) -> Any:
    """Return what a part above the runner, which is named in the schema, finds that a section refers to."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(section, hash_of)


def _code_pins(name: str) -> dict[str, str]:
    """Return what the code of a part is; nothing for ours, which VERSION of the stage covers."""
    if not is_own(name):
        return {}
    part_file(name)
    digests = CodeDigests(remembered(), Path(__file__).parents[1])
    found = digests.of_part(name)
    digests.save()
    return found


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
