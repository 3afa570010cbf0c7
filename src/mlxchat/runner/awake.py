"""Keeping a Mac awake while a run works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keep_awake() -> Iterator[None]:
    """Keep the machine from falling asleep in the body, on macOS; its display may. Elsewhere nothing happens."""
    program = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if program is None:
        yield
        return
    # It ends with this process (-w) however that ends.
    quiet = subprocess.DEVNULL
    try:
        watcher = subprocess.Popen(
            [program, "-i", "-w", str(os.getpid())], start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet
        )
    except OSError:
        yield
        return
    try:
        yield
    finally:
        watcher.terminate()
        watcher.wait()
