"""The first thing that runs in the process of a program that is not trusted: shut the doors, then run it.

A script, started by `execution.py` in an interpreter that sees no site-packages and no folder of ours; it imports
only the standard library. Its standard input holds the orders, as one JSON line, and later the answer to the
question whether the program has ended by itself.
"""

from __future__ import annotations

import _thread
import base64
import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

# <linux/sched.h>, <sys/mount.h>, <linux/prctl.h>, <linux/landlock.h>
_NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000 | 0x00020000  # user, net, ipc, mount
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 16384, 1 << 18
_PDEATHSIG, _SET_SECCOMP, _NO_NEW_PRIVILEGES, _FILTER_MODE = 1, 22, 38, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _CAPSET = 444, 445, 446, {"x86_64": 126, "aarch64": 91}
_EXECUTE, _WRITE, _READ, _LIST, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_FILE_RIGHTS = _EXECUTE | _WRITE | _READ | _TRUNCATE
_RIGHTS_BY_VERSION = {1: 13, 2: 14}
"""How many rights the first versions of Landlock know; the third adds truncation."""


def main(verdict: int) -> None:
    """Read the orders, confine this process, run the program, and let it be vouched for that it returned."""
    orders = json.loads(_read_line(0))
    answers = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.set_inheritable(verdict, False)
    os.environ.clear()
    in_force = _confine(orders)
    begun, done = _thread.allocate_lock(), _thread.allocate_lock()
    begun.acquire()
    done.acquire()
    _thread.stack_size(1 << 18)
    _thread.start_new_thread(
        _vouch, (verdict, answers, begun, done, _thread.get_ident(), sys._current_frames, main.__code__)
    )
    _thread.stack_size(0)
    os.write(verdict, (",".join(in_force) + "\n").encode())
    begun.acquire()

    # Taken now: the program may replace the functions of a module, and everything else that it can reach.
    write, leave, flush, show = os.write, os._exit, sys.stdout.flush, traceback.print_exception
    program = types.ModuleType("__main__")
    code = orders["code"]
    sys.modules |= {"__main__": program} | dict.fromkeys(("ctypes", "_ctypes"))  # type: ignore[arg-type]
    del sys._current_frames, sys._current_exceptions  # the ways to what another thread knows
    try:
        exec(compile(code, "<program>", "exec"), vars(program))
        flush()
    except BaseException as error:
        # The cause is told by a word, since what is printed is the program's own.
        write(verdict, b"memory" if isinstance(error, MemoryError) else b"raised")
        with contextlib.suppress(BaseException):
            flush()
            # Without the line of this file.
            show(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
        leave(1)
    done.release()
    begun.acquire()  # until the other thread ends the process


def _vouch(
    verdict: int,
    answers: int,
    begun: _thread.LockType,
    done: _thread.LockType,
    watched: int,
    frames: Callable[[], dict[int, types.FrameType]],
    code: types.CodeType,
) -> None:
    """Tell, from a thread of its own, whether the main thread has come back from the program.

    What only the one who asks may know is read here, so that it is in no place that the program can look at; and the
    program may say that it is done, but it cannot be done while it says so.
    """
    write, read, leave = os.write, os.read, os._exit
    question = read(answers, 64)
    begun.release()
    done.acquire()
    frame = frames().get(watched)
    if frame is None or frame.f_code is not code:
        write(verdict, b"raised")
        leave(1)
    write(verdict, question)
    # Only now is there something to know: the secret is sent to whoever asks with the right words.
    write(verdict, read(answers, 64))
    leave(0)


def _confine(orders: dict[str, Any]) -> list[str]:
    """Give up what the program shall not have; return the names of what is in force.

    What cannot be had on this machine is left out, and not named.
    """
    wanted, folder = orders["protections"], orders["folder"]
    in_force: list[str] = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != orders["parent"]:
            os._exit(1)  # it died before the line above
        steps: list[tuple[str, Callable[[], bool]]] = [
            ("namespaces", lambda: _enter_namespaces(libc, folder)),
            ("landlock", lambda: _restrict_paths(libc, folder, orders["readable"])),
            # Only Landlock knows which files; without it none is opened for writing.
            ("seccomp", lambda: _restrict_calls(libc, orders["filters"]["landlock" in in_force])),
        ]
    else:
        libc, steps = None, []
    os.chdir(folder)
    if libc is not None:
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for name, step in steps:
        if name == "seccomp":
            _limit(orders, alone="namespaces" in in_force)  # before it, since it forbids to set limits
        if name in wanted and step():
            in_force.append(name)
    if libc is None:
        _limit(orders, alone=True)
    return ["limits", *in_force]


def _limit(orders: dict[str, Any], *, alone: bool) -> None:
    """Set the limits of this process. Memory has none on a Mac, where the kernel knows none: it is watched.

    Args:
        orders: how much of what.
        alone: whether only this program's processes and threads count as the user's.
    """
    seconds, memory = int(orders["seconds"]) + 2, orders["memory_bytes"]
    limits = [
        ("RLIMIT_CPU", seconds), ("RLIMIT_FSIZE", orders["file_bytes"]), ("RLIMIT_NOFILE", 64), ("RLIMIT_CORE", 0),
    ]  # fmt: skip
    if sys.platform == "linux":
        limits += [("RLIMIT_AS", memory), ("RLIMIT_DATA", memory), ("RLIMIT_MSGQUEUE", 0), ("RLIMIT_MEMLOCK", 0)]
    limits.append(("RLIMIT_NPROC", orders["processes"] + (0 if alone else orders["other_processes"])))
    for name, value in limits:
        number = getattr(resource, name)
        most = resource.getrlimit(number)[1]
        allowed = value if most == resource.RLIM_INFINITY else min(value, most)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(number, (allowed, allowed))


def _enter_namespaces(libc: Any, folder: str) -> bool:
    """Have no network, no shared memory of others, and a small file system in memory as the only folder."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_NAMESPACES) != 0:
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, b"size=16m,nr_inodes=1000,mode=700")
        os.chdir(folder)
    except OSError:
        pass  # without them the folder is an ordinary one
    call = _CAPSET.get(os.uname().machine)
    if call is not None:  # no capability, also not within the namespace
        header, data = struct.pack("Ii", 0x20080522, 0), bytes(24)
        libc.syscall(call, header, data)
    return True


def _restrict_paths(libc: Any, folder: str, readable: list[str]) -> bool:
    """Allow to read what Python needs, and to write in the folder (Landlock)."""
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    handled = (1 << _RIGHTS_BY_VERSION.get(version, 15)) - 1
    ruleset = libc.syscall(_CREATE_RULESET, struct.pack("Q", handled), 8, 0)
    if ruleset < 0:
        return False
    own = [(folder, handled & ~_EXECUTE)]
    devices = [(path, _READ | _WRITE) for path in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")]
    for path, rights in [*own, *devices, *((path, _EXECUTE | _READ | _LIST) for path in readable)]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights &= handled if os.path.isdir(path) else handled & _FILE_RIGHTS
        libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    done = libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return bool(done)


def _restrict_calls(libc: Any, encoded: str | None) -> bool:
    """Install the filter of system calls (seccomp)."""
    if encoded is None:
        return False
    lines = base64.b64decode(encoded)
    buffer = ctypes.create_string_buffer(lines, len(lines))
    program = struct.pack("HP", len(lines) // 8, ctypes.addressof(buffer))
    return bool(libc.prctl(_SET_SECCOMP, _FILTER_MODE, program, 0, 0) == 0)


def _read_line(file: int) -> bytes:
    """Return what stands before the first newline, and take nothing after it."""
    parts = []
    while part := os.read(file, 1 << 16):
        parts.append(part)
        if part.endswith(b"\n"):  # nothing more is sent until we ask
            break
    return b"".join(parts)


if __name__ == "__main__":
    main(int(sys.argv[1]))
