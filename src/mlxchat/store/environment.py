"""Code, versions, machine and command line of a run: recorded in manifests, never part of an identity."""

from __future__ import annotations

import contextlib
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGES = ("mlxchat", "mlx", "hydra-core", "numpy", "tiktoken", "rustbpe", "pyarrow", "safetensors")


class Environment:
    """Facts gathered once per run, when the first step needs them."""

    def __init__(self, describe_device: Callable[[], dict[str, Any]]) -> None:
        """`describe_device` may import MLX, which this module must not."""
        self._describe_device = describe_device
        self._facts: dict[str, Any] = {}

    def record(self) -> dict[str, Any]:
        """Return git, versions, device and argv for a manifest."""
        self._facts = self._facts or {
            "git": git_state(Path(__file__).parent), "versions": versions(), "device": self._describe_device(),
            "argv": ["mlxchat", *sys.argv[1:]],
        }  # fmt: skip
        return self._facts


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

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "environment.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


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
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
