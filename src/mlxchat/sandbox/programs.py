"""Run programs that a model wrote, without trusting them. Counterpart of nanochat/execution.py.

That one calls itself no security sandbox; this one is meant to be. Each program runs in a fresh interpreter with
nothing in its environment, in a session and a folder of its own, under limits of processor time, memory, file size,
files and processes, and is killed with all that it started when its time is up. What the operating system offers beyond
that is used where it is permitted, and named in the outcome:

- Linux, namespaces (user, PID, network, IPC, mount): no network, no other process, no file but Python's own, read-only,
  and a folder of 16 MB in memory.
- Linux, Landlock: only Python's own files can be read, only the folder can be written; from Linux 6.7 no TCP, from 6.12
  no signal to another process.
- Linux, seccomp: only listed system calls, none of which starts or reaches a process or opens a socket. Where Landlock
  is missing, no file can be opened for writing.
- macOS: sandbox-exec (no network, no process, no signal, nothing written elsewhere). The kernel has no limit of
  memory, so what the program has in memory is looked at ten times a second.

A program has passed if all of it was executed, to the end. Its exit status says nothing about that: it passes by
sending back a secret, which a second thread asks for once it has seen the main thread come back. An early exit cannot
do that by accident. A program that searches the interpreter for that thread (`gc`, frames, memory) can: it gains a
point and harms nothing, as one does that replaces what it is tested with.

What a program can do where only some of this is in force on Linux (tests/sandbox/test_escapes.py shows each cell):

| in force | find a file | read it | write it | signal a process | connect (TCP) | fork |
|---|---|---|---|---|---|---|
| limits alone | yes | yes | yes | yes | yes | yes |
| namespaces | | | | | | yes |
| Landlock (Linux 6.12) | yes | | | | | yes |
| seccomp | yes | yes | | | | |
| Landlock and seccomp | yes | | | | | |
| all | | | | | | |

The file, the process and the server are outside the sandbox and belong to the same user. Containers often forbid user
namespaces: then Landlock and seccomp remain, and a program can learn that a file exists, its size and its times.
Its folder is then on a disk, and a program that has written 64 MB, or made more than 1,000 files, folders and links, is
ended within a tenth of a second.

As root without CAP_SYS_PTRACE the system does not say how much was written: then files that the program has deleted do
not count, until it ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxchat.sandbox.execution import PROTECTIONS, Outcome, Run

__all__ = ["PROTECTIONS", "Outcome", "protections_here", "run_program", "run_programs"]


def run_program(
    code: str,
    *,
    seconds: float = 5.0,
    memory_bytes: int = 256 << 20,
    protections: Iterable[str] = PROTECTIONS,
) -> Outcome:
    """Execute a program and return whether it reached its end.

    Args:
        code: Python source; it runs as __main__.
        seconds: of wall clock that it may take.
        memory_bytes: that it may have, the interpreter's own included (about 20 MB).
        protections: those to use where this machine has them; for tests of the others.

    Raises:
        StepFailed: no interpreter can be started here, which is not the program's fault.
    """
    with _own_folder() as folder:
        run = Run(folder, code, seconds, memory_bytes, tuple(protections))
        outcome = run.follow()
        if outcome.passed and not folder.is_dir():
            return Outcome(False, "failed", outcome.output, outcome.seconds, outcome.protections)
        return outcome


def run_programs(
    codes: list[str],
    *,
    workers: int | None = None,
    seconds: float = 5.0,
    memory_bytes: int = 256 << 20,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Outcome]:
    """Execute several programs at a time and return their outcomes in order.

    Args:
        codes: the programs.
        workers: at a time; None: as many as there are cores.
        seconds: of wall clock for each.
        memory_bytes: for each.
        on_progress: called with the number of programs that have ended, after each.
    """
    done: list[Outcome] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for outcome in pool.map(lambda code: run_program(code, seconds=seconds, memory_bytes=memory_bytes), codes):
            done.append(outcome)
            on_progress(len(done))
    return done


def protections_here() -> tuple[str, ...]:
    """Return what is in force on this machine, found by running an empty program."""
    return run_program("").protections


@contextmanager
def _own_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="mlxchat-program-")).resolve()
    try:
        yield folder
    finally:
        with suppress(OSError):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, whatever a program made in it: closed to its owner, or deeper than a path may be long.

    Inner folders come up to the first level before they are looked into, so that neither calls nor paths get deep.
    """
    _open(folder)
    while entries := list(folder.iterdir()):
        for entry in entries:
            if not _is_folder(entry):
                entry.unlink()
                continue
            _open(entry)
            for inner in entry.iterdir():
                if _is_folder(inner):
                    _open(inner)  # a folder that is moved must be open itself
                    inner.rename(folder / os.urandom(16).hex())
                else:
                    inner.unlink()
            entry.rmdir()
    folder.rmdir()


def _open(folder: Path) -> None:
    if folder.stat().st_mode & 0o700 != 0o700:
        folder.chmod(0o700)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
