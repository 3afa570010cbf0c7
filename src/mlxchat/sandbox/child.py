"""Script that confines its process and then runs an untrusted program.

`programs.py` starts it in an interpreter without site-packages; it imports only the standard library. Standard input
carries the orders as one JSON line, then a question and a secret, with which the script proves that the program ran to
its end.
"""

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

# <linux/sched.h>, <sys/mount.h>, <linux/mount.h>, <linux/prctl.h>, <linux/landlock.h>
_NEW_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x00020000  # user, PID, net, IPC, mount
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY, _MOUNT_SETATTR = 2, -100, 0x8000, 1, 442
_UNUSED_USER = 65534  # nobody
_PDEATHSIG, _SET_SECCOMP, _NO_NEW_PRIVILEGES, _FILTER_MODE = 1, 22, 38, 2
_CAPSET, _PIVOT_ROOT = {"x86_64": (126, 155), "aarch64": (91, 41)}.get(os.uname().machine, (None, None))
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE, _READ, _LIST, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_FILE_RIGHTS = _EXECUTE | _WRITE | _READ | _TRUNCATE
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights for files each version of Landlock has; since 3 truncation, since 5 ioctl on devices."""
_NETWORK_RIGHTS, _SCOPES = 0b11, 0b11
"""Bind and connect with TCP, since version 4; abstract Unix sockets and signals of others, since 6."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def main(verdict: int) -> None:
    """Read the orders, confine this process, run the program, and prove through `verdict` that it returned."""
    orders = json.loads(_read_line(0))
    answers = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.set_inheritable(verdict, False)
    os.environ.clear()
    in_force = _confine(orders, files=max(verdict, answers) + 1)
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

    # Bind these now, because the program can replace functions of modules.
    write, leave, flush, show = os.write, os._exit, sys.stdout.flush, traceback.print_exception
    program = types.ModuleType("__main__")
    code = orders["code"]
    # None prevents an import, which typeshed does not know.
    sys.modules |= {"__main__": program} | dict.fromkeys(("ctypes", "_ctypes"))  # type: ignore[arg-type]
    del sys._current_frames, sys._current_exceptions  # they would give access to the other thread's frames
    try:
        exec(compile(code, "<program>", "exec"), vars(program))
        flush()
    except BaseException as error:
        # The cause goes through the pipe, because the program controls its output.
        write(verdict, b"memory" if isinstance(error, MemoryError) else b"raised")
        with contextlib.suppress(BaseException):
            flush()
            # Skip this file's frame.
            show(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
        leave(1)
    done.release()
    begun.acquire()  # blocks until the other thread ends the process


def _vouch(
    verdict: int, answers: int, begun: _thread.LockType, done: _thread.LockType, watched: int,
    frames: Callable[[], dict[int, types.FrameType]], code: types.CodeType,
) -> None:  # fmt: skip
    """Prove, in a second thread, that the main thread has returned from the program.

    The question exists only in this thread's frame. A program may release the lock `done` itself, but then the main
    thread's frame shows that it is still running.
    """
    write, read, leave = os.write, os.read, os._exit
    question = read(answers, 64)
    if not question:
        leave(1)  # the parent process has ended
    begun.release()
    done.acquire()
    frame = frames().get(watched)
    if frame is None or frame.f_code is not code:
        write(verdict, b"raised")
        leave(1)
    write(verdict, question)
    # The parent sends the secret only now, in reply to the question.
    write(verdict, read(answers, 64))
    leave(0)


def _confine(orders: dict[str, Any], *, files: int) -> list[str]:
    """Confine this process as ordered; return the names of the protections in force, which the system may lack.

    `files` is greater than every open file descriptor.
    """
    wanted, folder = orders["protections"], orders["folder"]
    if sys.platform != "linux":
        os.chdir(folder)
        _limit(orders, others=0)
        return ["limits"]
    in_force = ["limits"]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if os.getuid() == 0:
        # RLIMIT_NPROC exempts processes whose real user is root. Access to files depends on the effective user.
        with contextlib.suppress(OSError):
            os.setresuid(_UNUSED_USER, 0, 0)
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != orders["parent"]:
        os._exit(1)  # the parent died before the line above
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if "namespaces" in wanted and _enter_namespaces(libc, folder, orders["readable"]):
        in_force.append("namespaces")
    os.chdir(folder)
    if _CAPSET is not None:  # no capability, neither here nor in the namespace
        libc.syscall(_CAPSET, struct.pack("Ii", 0x20080522, 0), bytes(24))
    if "namespaces" in in_force:
        for _ in range(2):  # the first process of a PID namespace would be immune to its own signals
            _go_on_in_child(libc, files)
    # Within the namespace only the two processes above count.
    _limit(orders, others=2 if "namespaces" in in_force else orders["other_processes"])
    if "landlock" in wanted and _restrict_paths(libc, folder, orders["readable"]):
        in_force.append("landlock")
    # Without Landlock no file may be opened for writing, because seccomp cannot see paths.
    writes = "landlock" in in_force
    if "seccomp" in wanted and _restrict_calls(libc, orders["filters"][f"{os.getpid()}, {writes=}"]):
        in_force.append("seccomp")
    return in_force


def _go_on_in_child(libc: Any, files: int) -> None:
    """Fork and return in the child; the parent waits for it and exits with its status."""
    child = os.fork()
    if child == 0:
        # If the parent ends before this line, no question arrives and the program never starts.
        libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    os.closerange(0, files)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def _limit(orders: dict[str, Any], *, others: int) -> None:
    """Set resource limits. macOS cannot limit memory, so there the parent watches it.

    `others` are processes and threads of the user besides the program's.
    """
    memory = orders["memory_bytes"]
    limits = {"CPU": int(orders["seconds"]) + 2, "FSIZE": orders["file_bytes"], "NOFILE": 64, "CORE": 0}
    if sys.platform == "linux":
        limits |= {"AS": memory, "DATA": memory, "MSGQUEUE": 0, "MEMLOCK": 0}
    limits["NPROC"] = orders["processes"] + others
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(number)[1]
        allowed = value if most == resource.RLIM_INFINITY else min(value, most)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(number, (allowed, allowed))


def _enter_namespaces(libc: Any, folder: str, readable: list[str]) -> bool:
    """Enter new namespaces without network, other processes, shared memory, and files that Python does not need.

    The folder becomes a small tmpfs. Child processes are in a new PID namespace. Return whether that succeeded.
    """
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEW_NAMESPACES) != 0:
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return True  # an unmapped user cannot create files in a new mount: keep the file system as it is
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    try:
        _change_root(libc, folder, readable)
    except OSError:
        libc.umount2(os.fsencode(folder), _MNT_DETACH)
        libc.mount(b"tmpfs", b"/proc", b"tmpfs", flags, b"size=4k,mode=500")
    libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, b"size=16m,nr_inodes=1000,mode=700")
    return True


def _change_root(libc: Any, folder: str, readable: list[str]) -> None:
    """Change to a read-only root with only the files that Python needs, and an empty folder; OSError if refused."""

    def check(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), "mount")

    check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _MS_NOSUID, b"size=1m,nr_inodes=1000,mode=755"))
    bound: list[str] = []
    for path in sorted({*readable, *_DEVICES}):
        # Do not create paths below a bound folder: they would be created outside.
        if any(path.startswith(f"{other}/") for other in bound) or not os.path.exists(path):
            continue
        place = folder + path
        if os.path.isdir(path):
            os.makedirs(place)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
        check(libc.mount(os.fsencode(path), os.fsencode(place), None, _MS_BIND | _MS_REC, None))
        bound.append(path)
    os.makedirs(folder + folder, exist_ok=True)
    attributes = struct.pack("4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(folder), _AT_RECURSIVE, attributes, len(attributes))
    os.chdir(folder)
    check(libc.syscall(_PIVOT_ROOT or -1, b".", b"."))  # the old root now lies over the new one
    check(libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def _restrict_paths(libc: Any, folder: str, readable: list[str]) -> bool:
    """Allow reading Python's files, writing in the folder, and signals only to itself (Landlock); return success."""
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    handled = (1 << _RIGHTS_BY_VERSION.get(version, 16)) - 1
    attributes = struct.pack("3Q", handled, _NETWORK_RIGHTS, _SCOPES)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, 8 if version < 4 else 16 if version < 6 else 24, 0)
    if ruleset < 0:
        return False
    own = [(folder, handled & ~_EXECUTE)]
    devices = [(path, _READ | _WRITE) for path in _DEVICES]
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
    """Install the filter of system calls (seccomp); return success."""
    if encoded is None:
        return False
    lines = base64.b64decode(encoded)
    buffer = ctypes.create_string_buffer(lines, len(lines))
    program = struct.pack("HP", len(lines) // 8, ctypes.addressof(buffer))
    return bool(libc.prctl(_SET_SECCOMP, _FILTER_MODE, program, 0, 0) == 0)


def _read_line(file: int) -> bytes:
    """Return the first line of a file."""
    parts = []
    while part := os.read(file, 1 << 16):
        parts.append(part)
        if part.endswith(b"\n"):  # nothing more is sent before the first reply
            break
    return b"".join(parts)


if __name__ == "__main__":
    main(int(sys.argv[1]))
