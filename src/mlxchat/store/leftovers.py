"""What gc may be asked to keep, and what is left over beside the artifacts: work, trash, names that lead nowhere."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxchat.config.wording import plural
from mlxchat.errors import ConfigError
from mlxchat.store import locks
from mlxchat.store.naming import groups
from mlxchat.store.store import MANIFEST, Store

DAY_SECONDS = 86400.0
_LEFT_OVER_DAYS = 7


@dataclass(frozen=True)
class Limits:
    """What is kept of ended runs; None: everything that a run's refs lead to."""

    keep_last: int | None = None
    """So many artifacts of each step, the newest."""
    older_than_seconds: float | None = None
    """Whatever was published later is kept; also the age from which work that was left over may go."""
    max_bytes: float | None = None
    """Remove, the oldest first, only until the store is as small as this."""

    def given(self) -> bool:
        """Tell whether there is any limit."""
        return (self.keep_last, self.older_than_seconds, self.max_bytes) != (None, None, None)


@dataclass(frozen=True)
class Garbage:
    """One thing that may go."""

    path: Path
    kind: str
    """artifact, work, trash, index or ref."""
    bytes: int
    reason: str


def parse_age(text: str) -> float:
    """Return the seconds of 90s, 30m, 12h, 7d or 2w.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if found is None:
        raise ConfigError(f'"{text}" is no age: expected for instance 12h, 7d or 2w')
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": DAY_SECONDS, "w": 7 * DAY_SECONDS}[found[2]]


def parse_bytes(text: str) -> float:
    """Return the bytes of 500MB, 10GB or 1.5TB (powers of 1,000).

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if found is None:
        raise ConfigError(f'"{text}" is no size: expected for instance 500MB or 10GB')
    return float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[found[2]]


def left_overs(store: Store, limits: Limits) -> Iterator[Garbage]:
    """Yield work that nobody continues, artifacts that were never finished, and what an earlier gc did not delete."""
    age = limits.older_than_seconds if limits.older_than_seconds is not None else _LEFT_OVER_DAYS * DAY_SECONDS
    for path in entries(store.outputs / "work"):
        if not path.is_dir() or locks.is_held(store.lock(path.name)):
            continue
        idle = time.time() - _last_change(path)
        if idle >= age:
            yield Garbage(path, "work", size_of(path), f"left over, untouched for {idle / DAY_SECONDS:.0f} days")
    for path in (store.outputs / "work").glob(".import-*"):
        idle = time.time() - _last_change(path)
        if idle >= age and not locks.is_held(store.outputs / "locks" / "import.lock"):
            yield Garbage(path, "work", size_of(path), "an import from elsewhere that was not gone on with")
    for path in entries(store.outputs / "store"):
        if not (path / MANIFEST).exists():
            yield Garbage(path, "artifact", size_of(path), "never finished: it has no manifest")
    for path in entries(store.outputs / "trash"):
        yield Garbage(path, "trash", size_of(path), "an earlier gc was stopped before it deleted this")


def orphans(store: Store, staying: set[str]) -> Iterator[Garbage]:
    """Yield refs that lead to nothing, or will, and an index that only version 0.1 had."""
    for path in entries(store.outputs / "index" / "act"):
        yield Garbage(path, "index", 0, "of version 0.1")
    folders = {rid[:16] for rid in staying}
    for group in groups(store):
        for link in entries(store.outputs / "refs" / group):
            if link.is_symlink() and os.readlink(link)[-16:] not in folders:  # noqa: PTH115
                yield Garbage(link, "ref", 0, "its artifact is gone")


def remark_old(store: Store) -> str | None:
    """Return a line about outputs that version 0.1 left, until something was made in them; None: there are none."""
    count = sum((path / MANIFEST).exists() for path in entries(store.outputs / "store"))
    if not count or (store.outputs / "records").is_dir():
        return None
    return (
        f"{store.outputs} holds {plural(count, 'artifact')} of version 0.1: chat, show and export take them by name, "
        "runs make their own. To keep them apart: outputs=PATH. To remove them, once there are newer ones: "
        "mlxchat gc --keep-last 1 --apply"
    )


def entries(folder: Path) -> list[Path]:
    """Return what a folder holds, sorted, without hidden names; nothing if it is not there."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _last_change(folder: Path) -> float:
    return max((path.lstat().st_mtime for path in [folder, *folder.rglob("*")]), default=0.0)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())
