"""Execution of untrusted programs, confined by the operating system. Counterpart of nanochat/execution.py.

docs/internals/security.md has the threat model: what is trusted, what is confined, by which feature of which kernel.

Each program runs in a new interpreter (`child.py`) with an empty environment, its own session and folder, and resource
limits; all its descendants are killed with it. Where available, namespaces, Landlock and seccomp (Linux) or
sandbox-exec (macOS) are used, too, and named in the outcome. If a program could still reach files, processes or the
network of the user, callers refuse to run it (`find_confinement_problem`).

A program has passed if it was executed to its end. Its exit status does not show that. Instead `child.py` sends back a
secret, which a second thread requests once the main thread has returned from the program.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import platform
import secrets
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path

from mlxchat.errors import StepFailed

PROTECTIONS = ("namespaces", "landlock", "seccomp", "sandbox-exec")
"""Protections beyond resource limits, which are always in force."""

_CHILD = Path(__file__).with_name("child.py")
_MOST_OUTPUT_BYTES = 1 << 20
_KEPT_OUTPUT_BYTES = 16 << 10
_MOST_MESSAGE_BYTES = 256
_MOST_FILE_BYTES = 4 << 20
_MOST_WRITTEN_BYTES = 64 << 20  # of all files, if the folder is not a tmpfs
_MOST_ENTRIES = 1000  # files, folders and symlinks, as in the tmpfs
_MOST_PROCESSES = 32
_START_SECONDS = 60.0  # an interpreter starts in 0.05 s, but machines may be busy
_LOOK_SECONDS = 0.1
_PID_IN_NAMESPACE = 2  # the first process there only waits for it
_SANDBOX_EXEC = "/usr/bin/sandbox-exec"
_KILL_ROUNDS = 50
_PROC = Path("/proc")


@dataclass(frozen=True)
class Outcome:
    """Result of a program."""

    passed: bool
    """Whether the program was executed to its end."""
    status: str
    """passed, failed (an error or early exit), timeout, memory or output (it printed or wrote too much)."""
    output: str
    """The first 16 KiB of standard output and error."""
    seconds: float = 0.0
    """Wall-clock time of the program."""
    protections: tuple[str, ...] = ()
    """Protections in force: limits, and any of `PROTECTIONS`."""


def run_program(
    code: str, *, seconds: float = 5.0, memory_bytes: int = 256 << 20, protections: Iterable[str] = PROTECTIONS
) -> Outcome:
    """Execute Python source as __main__ and return its outcome.

    `seconds` limits wall-clock time, `memory_bytes` memory with the interpreter's own (about 20 MB); `protections` are
    used if available. StepFailed: the interpreter does not start, which is not the program's fault.
    """
    folder = Path(tempfile.mkdtemp(prefix="mlxchat-program-")).resolve()
    try:
        outcome = _Run(folder, code, seconds, memory_bytes, tuple(protections)).follow()
        is_whole = folder.is_dir() or not outcome.passed
        return outcome if is_whole else replace(outcome, passed=False, status="failed")
    finally:
        with suppress(OSError):
            _remove(folder)


@cache
def protections_here() -> tuple[str, ...]:
    """Return the protections that work on this machine, found by running an empty program."""
    return run_program("").protections


def find_confinement_problem() -> str:
    """Return why programs cannot be confined on this machine; empty if they can.

    Landlock (any version) with seccomp suffices. Namespaces do not: a system may allow them but forbid mounts, so that
    all files stay visible.
    """
    found = protections_here()
    if {"landlock", "seccomp"} <= set(found) or "sandbox-exec" in found:
        return ""
    return (
        "this machine cannot confine programs written by models: that needs Landlock and seccomp (Linux 5.13, x86-64 "
        f"or ARM64) or sandbox-exec (macOS); in force here: {', '.join(found)}"
    )


def _remove(folder: Path) -> None:
    """Remove a folder that may contain unreadable folders, or nesting deeper than paths can be long.

    Inner folders are moved up to the first level before they are listed, so that neither recursion nor paths get deep.
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
                    _open(inner)  # moving a folder needs write permission for it
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


@dataclass
class _Run:
    """One execution: the process and its pipes."""

    folder: Path
    code: str
    seconds: float
    memory_bytes: int
    protections: tuple[str, ...]
    output: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)
    """Unprocessed bytes of the verdict pipe."""
    printed_bytes: int = 0
    in_force: tuple[str, ...] | None = None
    """None until the interpreter is about to run the program."""
    confined: bool = False
    """Whether the program cannot start processes, so that there are no descendants to find."""
    ready_at: float = 0.0
    """Start of the program by the monotonic clock."""

    def follow(self) -> Outcome:
        """Run the program and return its outcome; the process and all descendants have ended then."""
        reading, writing = os.pipe()
        try:
            process = self._start(writing)
        except OSError as error:
            os.close(reading)
            raise StepFailed(f"programs cannot be executed: {sys.executable} does not start ({error})") from None
        finally:
            os.close(writing)
        began = time.monotonic()
        watch = _Watch(process.pid)
        try:
            status = self._watch(process, reading, watch)
        finally:
            self._end(process, watch)
            os.close(reading)
        if self.in_force is None:
            what = f"its output after {time.monotonic() - began:.0f} s: {self._text() or 'nothing'}"
            raise StepFailed(f"programs cannot be executed: {sys.executable} does not start ({what})")
        return Outcome(status == "passed", status, self._text(), time.monotonic() - self.ready_at, self.in_force)

    def _start(self, verdict: int) -> subprocess.Popen[bytes]:
        # As -I, but with PYTHONHASHSEED, which makes sets and hashes reproducible.
        command = [sys.executable, "-P", "-s", "-S", str(_CHILD), str(verdict)]
        self.wrapped = "sandbox-exec" in self.protections and os.access(_SANDBOX_EXEC, os.X_OK)
        if self.wrapped:
            command = [_SANDBOX_EXEC, "-p", mac_profile(self.folder), *command]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.folder,
            env={"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"},  # per-thread arenas would count as memory
            pass_fds=[verdict], start_new_session=True,
        )  # fmt: skip
        self.question, self.secret = secrets.token_hex(16).encode(), secrets.token_hex(16).encode()
        filters: dict[str, str | None] = {}
        for pid, writes in product((process.pid, _PID_IN_NAMESPACE), (True, False)):
            lines = make_filter(pid, writes=writes)
            filters[f"{pid}, {writes=}"] = base64.b64encode(lines).decode() if lines else None
        orders = {
            "code": self.code, "parent": os.getpid(), "folder": str(self.folder),
            "seconds": self.seconds, "memory_bytes": self.memory_bytes, "file_bytes": _MOST_FILE_BYTES,
            "processes": _MOST_PROCESSES, "other_processes": _processes_here(),
            "protections": self.protections, "readable": _readable(), "filters": filters,
        }  # fmt: skip
        self.orders = json.dumps(orders).encode() + b"\n"
        return process

    def _watch(self, process: subprocess.Popen[bytes], verdict: int, watch: _Watch) -> str:
        """Serve the pipes until the process ends or must be killed; return the status."""
        assert process.stdin is not None
        assert process.stdout is not None
        sending, printed = process.stdin.fileno(), process.stdout.fileno()
        for pipe in (sending, printed, verdict):
            os.set_blocking(pipe, False)
        deadline = time.monotonic() + _START_SECONDS
        answered, look_at = False, 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(sending, selectors.EVENT_WRITE)
            selector.register(printed, selectors.EVENT_READ)
            selector.register(verdict, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(min(left, _LOOK_SECONDS)):
                    if key.fd == sending:
                        if not self._send(sending):
                            selector.unregister(sending)
                        continue
                    part = _read(key.fd)
                    if not part:
                        selector.unregister(key.fd)
                    if key.fd == printed:
                        self._keep(part)
                        continue
                    self.received += part
                    if self.in_force is None and b"\n" in self.received:
                        self._begin()
                        with suppress(OSError):
                            os.write(sending, self.question)
                        deadline = self.ready_at + self.seconds
                    if not self._is_expected(answered):
                        return "failed"  # the program itself wrote to the pipe
                    if self.in_force is not None and not answered and bytes(self.received) == self.question:
                        answered = True
                        self.received.clear()
                        with suppress(OSError):
                            os.write(sending, self.secret)
                    elif not part:
                        return self._verdict(answered, process, printed)
                if self.printed_bytes > _MOST_OUTPUT_BYTES:
                    return "output"
                if self.in_force is not None and time.monotonic() > look_at:
                    look_at = time.monotonic() + _LOOK_SECONDS
                    if not self.confined and watch.look() > self.memory_bytes:
                        return "memory"
                    # In namespaces the writing process is not the first one.
                    written = 0 if "namespaces" in self.in_force else watch.written() or 0
                    if written > _MOST_WRITTEN_BYTES or self._is_folder_full():
                        return "output"
        self._drain(printed)
        return "timeout"

    def _is_folder_full(self) -> bool:
        """Return whether the folder has too many entries or bytes.

        `_Watch.written` does not count folders, symlinks and empty files, and may not work for root. A tmpfs in a
        namespace is not visible from here; then the folder is empty.
        """
        waiting, entries, used = [str(self.folder)], 0, 0
        while waiting:
            try:
                with os.scandir(waiting.pop()) as found:
                    for entry in found:
                        entries += 1
                        used += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entries > _MOST_ENTRIES or used > _MOST_WRITTEN_BYTES:
                            return True
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
            except FileNotFoundError:  # removed meanwhile
                continue
            except OSError:  # not readable, or the path is too long
                return True
        return False

    def _verdict(self, answered: bool, process: subprocess.Popen[bytes], printed: int) -> str:
        """Return the status of a program whose verdict pipe is closed."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)  # for its return code
        self._drain(printed)
        if self.printed_bytes > _MOST_OUTPUT_BYTES:
            return "output"
        if answered and hmac.compare_digest(bytes(self.received), self.secret):
            return "passed"
        if bytes(self.received) == b"memory":
            return "memory"
        return "timeout" if process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU) else "failed"

    def _is_expected(self, answered: bool) -> bool:
        """Return whether the received bytes begin a message that `child.py` sends at this point."""
        if self.in_force is None:
            return len(self.received) < _MOST_MESSAGE_BYTES
        messages = (self.secret,) if answered else (self.question, b"memory", b"raised")
        return any(message.startswith(self.received) for message in messages)

    def _begin(self) -> None:
        first, _, rest = bytes(self.received).partition(b"\n")
        own = ("sandbox-exec",) if self.wrapped else ()
        self.in_force = (*(name for name in first.decode().split(",") if name), *own)
        self.confined = "seccomp" in self.in_force
        self.received[:] = rest
        self.ready_at = time.monotonic()

    def _send(self, sending: int) -> bool:
        """Send some of the orders; return whether more remain."""
        try:
            sent = os.write(sending, self.orders)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.orders = self.orders[sent:]
        return bool(self.orders)

    def _keep(self, part: bytes) -> None:
        self.printed_bytes += len(part)
        self.output += part[: max(0, _KEPT_OUTPUT_BYTES - len(self.output))]

    def _drain(self, printed: int) -> None:
        """Read the rest of the output."""
        while self.printed_bytes <= _MOST_OUTPUT_BYTES and (part := _read(printed)):
            self._keep(part)

    def _end(self, process: subprocess.Popen[bytes], watch: _Watch) -> None:
        """Kill the process group and descendants that left it."""
        if not self.confined:
            watch.look()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not self.confined:
            watch.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def _text(self) -> str:
        return self.output.decode("utf-8", errors="replace")


def _processes_here() -> int:
    """Return the number of processes and threads of this machine: at most these count against the user's limit."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    except OSError:
        return 0


def _readable() -> list[str]:
    """Return the files and folders that an interpreter without site-packages needs.

    Not all of a prefix, which may be a project (python -m venv .) or a home folder.
    """
    system = {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"}
    parts = ("lib", "lib64", "share/zoneinfo", "Python", "Resources")  # the last two in macOS frameworks
    own = {f"{prefix}/{part}" for prefix in (sys.base_prefix, sys.base_exec_prefix) for part in parts}
    start = {f"{sys.prefix}/pyvenv.cfg", sys.executable, os.path.realpath(sys.executable), str(_CHILD)}
    return sorted(system | own | start)


def mac_profile(folder: Path) -> str:
    """Return the rules of sandbox-exec for a program in `folder`."""
    home, own = json.dumps(str(Path.home())), json.dumps(str(folder))
    readable = " ".join(f"(subpath {json.dumps(path)})" for path in [str(folder), *_readable()])
    return f"""(version 1)
(allow default)
(deny network*)
(deny process-fork)
(deny signal (target others))
(deny file-write*)
(allow file-write* (subpath {own}))
(deny file-write-unlink (literal {own}))
(allow file-write-data (literal "/dev/null"))
(deny file-read-data (subpath {home}))
(allow file-read-data {readable})
"""


def _read(pipe: int) -> bytes:
    """Return the available bytes of a pipe; empty if there are none or it is closed."""
    try:
        return os.read(pipe, 1 << 16)
    except OSError:
        return b""


class _Watch:
    """A process and all its observed descendants, including those that left its group and session.

    Descent cannot be seen once a parent has ended, so the process table is read several times a second.
    """

    def __init__(self, pid: int) -> None:
        """`pid` is the first process."""
        self._known: dict[int, str] = {pid: ""}
        self._root = pid

    def look(self) -> int:
        """Record new descendants; return the resident bytes of all processes together."""
        table = _processes()
        for pid, (_, _, started) in table.items():
            if pid in self._known and self._known[pid] not in ("", started):
                del self._known[pid]  # the number was given to another process
        size = -1
        while size != len(self._known):
            size = len(self._known)
            for pid, (parent, _, started) in table.items():
                if parent in self._known or pid in self._known:
                    self._known[pid] = started
        return sum(resident for pid, (_, resident, _) in table.items() if pid in self._known)

    def written(self) -> int | None:
        """Return the bytes that the first process has written; None: unknown, as for root without CAP_SYS_PTRACE."""
        try:
            lines = (_PROC / str(self._root) / "io").read_text().splitlines()
        except OSError:
            return None
        counts = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
        # write_bytes also counts pages changed through file mappings.
        return max(counts.get("wchar", 0), counts.get("write_bytes", 0))

    def kill(self) -> None:
        """Kill all descendants until none is left. The caller kills the first process."""
        for _ in range(_KILL_ROUNDS):
            self.look()
            table = _processes()
            left = [pid for pid in self._known if pid != self._root and pid in table]
            if not left:
                return
            for pid in left:
                if table[pid][2] == self._known[pid]:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def _processes() -> dict[int, tuple[int, int, str]]:
    """Return each living process's parent, resident bytes and start time."""
    table = {}
    if (_PROC / "self").is_dir():
        for place in _PROC.iterdir():
            if place.name.isdigit():
                with suppress(OSError, IndexError, ValueError):
                    fields = (place / "stat").read_text().rpartition(")")[2].split()
                    if fields[0] not in "ZX":
                        resident = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
                        table[int(place.name)] = (int(fields[1]), resident, fields[19])
        return table
    listing = subprocess.run(
        ["/bin/ps", "-A", "-o", "pid=,ppid=,rss=,stat=,lstart="], capture_output=True, text=True, check=False
    )
    for line in listing.stdout.splitlines():
        fields = line.split(None, 4)
        if len(fields) == 5 and not fields[3].startswith("Z"):
            table[int(fields[0])] = (int(fields[1]), int(fields[2]) * 1024, fields[4])
    return table


# The filter of system calls (Linux, x86-64 and ARM64). Only listed calls are allowed, some only with certain arguments;
# all others fail with EPERM, including those of the x32 ABI, and a call through the 32-bit ABI kills the program. A
# program may compute, use files that it can open, and start threads. It cannot start a process, signal another one,
# open a socket, or change the owner or mode of a file.

# Classic BPF, <linux/filter.h>, and <linux/seccomp.h>.
_LOAD, _AND, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_EPERM, _ENOSYS = 1, 38

_ACCESS_MODE, _NEITHER, _TRUNCATES = 0x3, 0x3, 0x200
"""O_ACCMODE; its value for neither reading nor writing; O_TRUNC."""
_WRITING = 0x1 | 0x2 | 0x40 | _TRUNCATES
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC."""
_THREAD_FLAGS = (0x3D0F00, 0x7D0F00)
"""The flags with which glibc and musl start a thread."""
_HARMLESS_FCNTLS = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. F_SETOWN and F_SETSIG would direct signals at any process,
F_SETLEASE and F_SETLK would make others wait."""
_F_SETFL, _O_ASYNC = 4, 0x2000
_HARMLESS_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX. FIOASYNC, FIOSETOWN and SIOCSPGRP would direct signals, TIOCSTI
would type in a terminal."""
_HARMLESS_CLOSE_RANGES = (0, 4)
"""None and CLOSE_RANGE_CLOEXEC. CLOSE_RANGE_UNSHARE would give each thread its own file table and limit."""
_MAP_SHARED, _MAP_ANONYMOUS = 0x1, 0x20
_FUTEX_COMMAND = 0x7F
_HARMLESS_FUTEXES = (0, 1, 3, 4, 5, 9, 10)
"""WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET: those without priority inheritance, which takes
the number of any thread as an owner."""

# name: (x86-64, ARM64); None if the machine has no such call.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "close": (3, 57), "lseek": (8, 62),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "umask": (95, 166),
    "ftruncate": (77, 46), "fsync": (74, 82), "fdatasync": (75, 83),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "eventfd2": (290, 19),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "pause": (34, None),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "restart_syscall": (219, 128),
    "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293), "membarrier": (324, 283),
    "sched_yield": (24, 124), "getcpu": (309, 168), "exit": (60, 93), "exit_group": (231, 94),
    "wait4": (61, 260), "waitid": (247, 95),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getpid": (39, 172), "gettid": (186, 178), "getpgrp": (111, None),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getgroups": (115, 158), "getrlimit": (97, 163), "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278),
}  # fmt: skip
"""Calls that are always allowed."""

CHANGING: dict[str, tuple[int | None, int | None]] = {
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None), "symlinkat": (266, 36),
}  # fmt: skip
"""Calls that change folders and files by path; allowed only with Landlock."""

CONDITIONAL: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None), "openat": (257, 56), "close_range": (436, 436), "mmap": (9, 222), "fcntl": (72, 25),
    "ioctl": (16, 29), "futex": (202, 98),
    "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
    "getppid": (110, 173), "getpgid": (121, 155), "getsid": (124, 156), "sched_getaffinity": (204, 123),
}  # fmt: skip
"""Calls that are allowed only with certain arguments, or answered by the filter."""

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def make_filter(pid: int, *, writes: bool) -> bytes | None:
    """Return the filter as an array of `struct sock_filter`; None for other machines than x86-64 and ARM64 Linux.

    `pid` is the process in its own namespace. `writes` allows opening for writing, creating and removing files; the
    filter cannot see their paths, so this needs Landlock.
    """
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        return None
    column, architecture = _MACHINES[platform.machine()]
    lines = [_line(_LOAD, _ARCHITECTURE), *_unless_equal(architecture, [_line(_RETURN, _KILL)]), _line(_LOAD, _NUMBER)]
    for numbers in (*ALLOWED.values(), *(CHANGING.values() if writes else ())):
        if (number := numbers[column]) is not None:
            lines += _if_equal(number, [_ALLOWED])
    for name, body in _conditions(pid, writes=writes).items():
        if (number := CONDITIONAL[name][column]) is not None:
            lines += _if_equal(number, body)
    return b"".join([*lines, _REFUSED])


def _conditions(pid: int, *, writes: bool) -> dict[str, list[bytes]]:
    """Return name → instructions of each conditional call."""
    return {
        "open": _opening(1, writes=writes),
        "openat": _opening(2, writes=writes),
        "close_range": [_argument(2), *_allow_if_in(_HARMLESS_CLOSE_RANGES)],
        # Writes through a shared mapping of a tmpfs file are not counted, and one mapped page keeps a whole file.
        "mmap": [
            _argument(3),
            *_if_any_bit(_MAP_SHARED, [*_if_any_bit(_MAP_ANONYMOUS, [_ALLOWED]), _REFUSED]),
            _ALLOWED,
        ],
        "fcntl": [
            _argument(1),
            *_if_equal(_F_SETFL, [_argument(2), *_if_any_bit(_O_ASYNC, [_REFUSED]), _ALLOWED]),
            *_allow_if_in(_HARMLESS_FCNTLS),
        ],
        "ioctl": [_argument(1), *_allow_if_in(_HARMLESS_IOCTLS)],
        "futex": [_argument(1), _line(_AND, _FUTEX_COMMAND), *_allow_if_in(_HARMLESS_FUTEXES)],
        "clone": [_argument(0), *_allow_if_in(_THREAD_FLAGS)],
        # Its flags are in memory, which filters cannot read; with ENOSYS the C library falls back to clone.
        "clone3": [_line(_RETURN, _ERRNO | _ENOSYS)],
        "kill": [_argument(0), *_allow_if_in((pid,))],
        "tgkill": [_argument(0), *_allow_if_in((pid,))],
        # Reading its own limits: the third argument, a pointer to new ones, is null in both halves.
        "prlimit64": [
            _argument(2), *_unless_equal(0, [_REFUSED]), _argument(2, upper=True), *_unless_equal(0, [_REFUSED]),
            _argument(0), *_allow_if_in((0, pid)),
        ],
        # 0, as for a parent outside the namespace; without namespaces it would be our process.
        "getppid": [_line(_RETURN, _ERRNO | 0)],
        "getpgid": [_argument(0), *_allow_if_in((0, pid))],
        "getsid": [_argument(0), *_allow_if_in((0, pid))],
        "sched_getaffinity": [_argument(0), *_allow_if_in((0, pid))],
    }  # fmt: skip


def _opening(flags: int, *, writes: bool) -> list[bytes]:
    """Return the instructions for opening a file.

    Landlock before Linux 6.2 does not control truncation, so O_TRUNC without write access is refused.
    """
    if not writes:
        return [_argument(flags), *_if_any_bit(_WRITING, [_REFUSED]), _ALLOWED]
    return [
        _argument(flags), _line(_AND, _ACCESS_MODE), *_if_equal(_NEITHER, [_REFUSED]),
        _argument(flags), _line(_AND, _ACCESS_MODE | _TRUNCATES), *_if_equal(_TRUNCATES, [_REFUSED]), _ALLOWED,
    ]  # fmt: skip


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


_ALLOWED, _REFUSED = _line(_RETURN, _ALLOW), _line(_RETURN, _ERRNO | _EPERM)


def _argument(index: int, *, upper: bool = False) -> bytes:
    """Load half of an argument; the kernel uses only the lower half of an int."""
    return _line(_LOAD, _ARGUMENTS + 8 * index + 4 * upper)


def _if_equal(value: int, body: list[bytes]) -> list[bytes]:
    return [_line(_JUMP_EQUAL, value, 0, len(body)), *body]


def _unless_equal(value: int, body: list[bytes]) -> list[bytes]:
    return [_line(_JUMP_EQUAL, value, len(body), 0), *body]


def _if_any_bit(bits: int, body: list[bytes]) -> list[bytes]:
    return [_line(_JUMP_ANY_BIT, bits, 0, len(body)), *body]


def _allow_if_in(values: tuple[int, ...]) -> list[bytes]:
    return [*(line for value in values for line in _if_equal(value, [_ALLOWED])), _REFUSED]
