"""`mlxchat` with arguments: in a process of its own, or in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mlxchat.cli import main

Command = Callable[..., tuple[int, str]]
Say = Callable[..., str]
CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]
MLXCHAT = (sys.executable, "-m", "mlxchat")


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without settings of mlxchat, Hydra and Python."""
    return {
        key: value for key, value in os.environ.items() if not key.startswith(("MLXCHAT", "HYDRA", "PYTHON"))
    } | more


def run_process(
    *arguments: str | Path, cwd: Path, environ: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `mlxchat` in a new process to its end."""
    return subprocess.run(
        [*MLXCHAT, *map(str, arguments)], cwd=cwd, env=clean_environment(**environ or {}), capture_output=True,
        text=True, timeout=timeout, check=False,
    )  # fmt: skip


def start_process(*arguments: str | Path, cwd: Path, stderr: int = subprocess.STDOUT) -> subprocess.Popen[str]:
    """Start `mlxchat` and return the process, which the caller waits for."""
    return subprocess.Popen(
        [*MLXCHAT, *map(str, arguments)], cwd=cwd, env=clean_environment(), stdout=subprocess.PIPE, stderr=stderr,
        text=True,
    )  # fmt: skip


def run_here(*arguments: str | Path) -> int:
    """Run `mlxchat` in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    return int(ended.value.code or 0)
