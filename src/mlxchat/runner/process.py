"""The running process: signals that stop it, its progress display, its versions, code and memory."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlxchat.config.wording import format_seconds
from mlxchat.errors import visible

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heard_signals() -> list[signal.Signals]:
    """Return the signals that stop a run: under nohup without SIGHUP."""
    return [number for number in SIGNALS if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]


@contextmanager
def stop_on_signals(request: Callable[[int], None], announce: Callable[[], None]) -> Iterator[None]:
    """Call `request` with the number of the first signal, and end the process at a repeated Ctrl-C or `kill`.

    `request` interrupts the main thread at any point, so it may only set a flag. `announce` prints in another thread,
    which also ends the process if the main thread is inside a library and cannot handle signals. Files on disk are
    always complete, so no cleanup is needed. Outside the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        request(number)

    def watch() -> None:
        # SLURM repeats SIGTERM within milliseconds, and a closing terminal SIGHUP: these wait for the run.
        in_job = "SLURM_JOB_ID" in os.environ or "SUBMITIT_EXECUTOR" in os.environ
        ending = {signal.SIGINT} if in_job else {signal.SIGINT, signal.SIGTERM}
        is_stopping = False
        while numbers := os.read(reading, 16):
            for number in numbers:
                if number in SIGNALS and not is_stopping:
                    is_stopping = True
                    with suppress(Exception):
                        announce()
                elif number in ending:
                    os._exit(128 + number)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, handle) for number in heard_signals()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)
        signal.set_wakeup_fd(former)
        os.close(writing)
        thread.join()
        os.close(reading)


def leave_terminal() -> None:
    """Print nowhere from now on: writing to a closed terminal fails."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(handle).st_mode):
                os.dup2(nowhere, handle)
    os.close(nowhere)


@contextmanager
def keep_awake() -> Iterator[None]:
    """Keep a Mac awake in the body; its display may sleep. Does nothing elsewhere."""
    if sys.platform != "darwin":
        yield
        return
    # -w: caffeinate ends with this process
    with subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())], start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.terminate()


_PLAIN_INTERVAL_SECONDS = 5.0
_SPINNER_COLUMNS = 2


class Progress:
    """Progress of one long task, used as a context manager."""

    def __init__(self, title: str, total: int, unit: str, *, start: int = 0, stream: TextIO | None = None) -> None:
        """Show `total` units of work called `unit`; `start` of them are already done."""
        self.title, self.total, self.unit, self.start = title, total, unit, start
        self.stream = stream if stream is not None else sys.stderr
        self.began = self.last_line = time.monotonic()
        self._first: tuple[int, float] | None = None
        """Units and time of the first update: what comes before includes compiling and loading."""
        self.bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn

            columns = (SpinnerColumn(), TextColumn("{task.fields[line]}", markup=False))
            self.bar = Progress(*columns, console=Console(file=self.stream), transient=True)
            self.task = self.bar.add_task("", line=self.title)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, **numbers: str) -> None:
        """Show that `done` units are finished, with formatted numbers (loss="3.91"), the most important first."""
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
        before, then = self._first
        eta = [f"eta {format_seconds((now - then) / (done - before) * (self.total - done))}"] if done > before else []
        parts = [value if key in ("speed", "memory") else f"{key} {value}" for key, value in numbers.items() if value]
        share, amount = min(1.0, done / max(1, self.total)), f"{done}/{self.total} {self.unit}"
        if self.bar is not None:
            width = self.bar.console.width - _SPINNER_COLUMNS
            line = f"{self.title:<9} {share:>4.0%}  " + "  ".join([amount, *eta, *parts])
            self.bar.update(self.task, line=line[:width])
        elif now - self.last_line >= _PLAIN_INTERVAL_SECONDS or done >= self.total:
            self.last_line = now
            text = "  ".join([amount, *parts, *eta])
            print(f"  {self.title:<9} {share:>4.0%}  {text}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """Print a permanent line, above the live one if there is one."""
        line = visible(f"  {self.title:<9} {text}")
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)


_PACKAGES = ("mlxchat", "mlx", "hydra-core", "numpy", "tiktoken", "rustbpe", "pyarrow", "safetensors")


class Environment:
    """Facts gathered once per run, when the first step needs them."""

    def __init__(self, describe_device: Callable[[], dict[str, Any]]) -> None:
        self._describe_device = describe_device  # may import MLX, which this module must not
        self._facts: dict[str, Any] = {}

    def record(self) -> dict[str, Any]:
        """Return git, versions, device and argv for a manifest."""
        if not self._facts:
            self._facts = {"git": git_state(), "versions": versions(), "device": self._describe_device()}
            self._facts["argv"] = ["mlxchat", *sys.argv[1:]]
        return self._facts


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    import importlib.metadata  # slow: not for verbs that only read

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state() -> dict[str, Any] | None:
    """Return commit and `dirty` of the git checkout that this code runs from; None if it is not a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
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
