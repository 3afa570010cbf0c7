"""Code, versions, machine and command line of a run: recorded in manifests, never part of an identity."""

from __future__ import annotations

import contextlib
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

_PACKAGES = ("mlxchat", "mlx", "hydra-core", "numpy", "tiktoken", "rustbpe", "pyarrow", "safetensors")


class Environment:
    """Facts gathered once per run, when the first step needs them."""

    def __init__(self, describe_device: Callable[[], dict[str, Any]]) -> None:
        """`describe_device` may import MLX, which this module must not."""
        self._describe_device = describe_device

    def record(self) -> dict[str, Any]:
        """Return git, versions, device and argv for a manifest."""
        return self._facts

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return {
            "git": git_state(Path(__file__).parent),
            "versions": versions(),
            "device": self._describe_device(),
            "argv": ["mlxchat", *sys.argv[1:]],
        }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    import importlib.metadata  # slow: not for verbs that only read

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and `dirty` of the git checkout that this code runs from; None if it is not a checkout."""
    try:
        git = ["git", "-C", str(folder)]
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "environment.py"], capture_output=True)
        if tracked.returncode:
            return None
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(dirty.stdout.strip())}


def reset_peak_memory() -> None:
    """Reset the peaks of `peak_array_bytes` and, on Linux, `peak_memory_bytes`."""
    mlx = sys.modules.get("mlx.core")
    if mlx is not None:
        mlx.reset_peak_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_array_bytes() -> int | None:
    """Return the peak memory of MLX's arrays since the reset; None if MLX computed nothing."""
    mlx = sys.modules.get("mlx.core")
    return (mlx.get_peak_memory() or None) if mlx is not None else None


def peak_memory_bytes() -> int:
    """Return this process's peak memory since the reset, or since its start where the system has no reset."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
