"""What a rank says of itself before anything is computed together, and in what ranks of one run must agree."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mlxchat import __version__

Facts = dict[str, Any]

# In what all ranks must agree, and how people call it.
_EQUAL = {"mlxchat": "mlxchat", "code": "code of mlxchat (digest)", "mlx": "MLX", "backend": "backend"}
_CODE_LETTERS = 12


def find_facts(rank: int) -> Facts:
    """Return rank, host, process, versions, digest of the code and backend (cpu, metal or cuda) of this process."""
    from mlxchat.ops.device import backend

    return {
        "rank": rank, "host": platform.node(), "pid": os.getpid(), "place": _place(), "mlxchat": __version__,
        "code": code_digest(), "mlx": importlib.metadata.version("mlx"), "backend": backend(),
    }  # fmt: skip


def find_differences(own: Facts, other: Facts) -> list[str]:
    """Return in what another rank differs from this one, a line for each; empty if they can work together."""
    return [
        f"{name} is {other.get(key)!s} there and {own[key]!s} here"
        for key, name in _EQUAL.items()
        if other.get(key) != own[key]
    ]


def describe_rank(facts: Facts) -> str:
    """Return which rank it is, and where: 'rank 1 (process 4711 on mini2)'."""
    return f"rank {facts['rank']} (process {facts['pid']} on {facts['host']})"


def _place() -> str:
    """Return a text that is equal exactly for processes that see each other under the same numbers."""
    found = [platform.node()]
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        found += [boot, str(Path("/proc/self/ns/pid").readlink())]
    return " ".join(found)


@cache
def code_digest() -> str:
    """Return a digest of all of mlxchat's own files, as far as they are Python."""
    folder = Path(sys.modules["mlxchat"].__path__[0])
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:_CODE_LETTERS]
