"""A filter of system calls for programs that are not trusted (Linux, x86-64 and ARM64).

Only the listed calls are allowed, some of them only with some arguments; every other number fails with EPERM, those of
the x32 ABI included, and a call through the 32-bit ABI kills the program. A program may compute, use the files that it
can open, and start threads. It cannot start a process, send a signal to another one, open a socket, or change the owner
or mode of a file.
"""

from __future__ import annotations

import platform
import struct

# Classic BPF, <linux/filter.h>, and <linux/seccomp.h>.
_LOAD, _AND, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_EPERM, _ENOSYS = 1, 38

_ACCESS_MODE, _NEITHER, _TRUNCATES = 0x3, 0x3, 0x200
"""O_ACCMODE; its value that requests neither reading nor writing; O_TRUNC."""
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
"""None and CLOSE_RANGE_CLOEXEC. CLOSE_RANGE_UNSHARE would give a thread a table of files, and a limit, of its own."""
_MAP_SHARED, _MAP_ANONYMOUS = 0x1, 0x20
_FUTEX_COMMAND = 0x7F
_HARMLESS_FUTEXES = (0, 1, 3, 4, 5, 9, 10)
"""WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET: those without priority inheritance, which takes
the number of any thread as an owner."""

# name: (x86-64, ARM64); None where the machine has no such call.
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
"""What a program may always do."""

CHANGING: dict[str, tuple[int | None, int | None]] = {
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None), "symlinkat": (266, 36),
}  # fmt: skip
"""What changes folders and files by their names."""

CONDITIONAL: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None), "openat": (257, 56), "close_range": (436, 436), "mmap": (9, 222), "fcntl": (72, 25),
    "ioctl": (16, 29), "futex": (202, 98),
    "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
    "getppid": (110, 173), "getpgid": (121, 155), "getsid": (124, 156), "sched_getaffinity": (204, 123),
}  # fmt: skip
"""What is allowed with some arguments only, or answered without the kernel."""

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def make_filter(pid: int, *, writes: bool) -> bytes | None:
    """Return a filter as an array of `struct sock_filter`, None on a machine it is not made for.

    Args:
        pid: of the process, as it sees itself.
        writes: whether files may be opened for writing, created and removed. This filter cannot see which ones, so
            that needs Landlock.
    """
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        return None
    column, architecture = _MACHINES[platform.machine()]
    lines = [
        _line(_LOAD, _ARCHITECTURE),
        *_unless_equal(architecture, [_line(_RETURN, _KILL)]),
        _line(_LOAD, _NUMBER),
    ]
    for numbers in (*ALLOWED.values(), *(CHANGING.values() if writes else ())):
        if (number := numbers[column]) is not None:
            lines += _if_equal(number, [_ALLOWED])
    for name, body in _conditions(pid, writes=writes).items():
        if (number := CONDITIONAL[name][column]) is not None:
            lines += _if_equal(number, body)
    return b"".join([*lines, _REFUSED])


def _conditions(pid: int, *, writes: bool) -> dict[str, list[bytes]]:
    """Return the instructions that decide about each conditional call."""
    return {
        "open": _opening(1, writes=writes),
        "openat": _opening(2, writes=writes),
        "close_range": [_argument(2), *_allow_if_in(_HARMLESS_CLOSE_RANGES)],
        # A shared mapping writes to a file in memory (tmpfs) uncounted, and one page of it keeps the whole file.
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
        # Its flags are in memory, which no filter can read: the C library falls back to clone.
        "clone3": [_line(_RETURN, _ERRNO | _ENOSYS)],
        "kill": [_argument(0), *_allow_if_in((pid,))],
        "tgkill": [_argument(0), *_allow_if_in((pid,))],
        # Reading its own limits: the third argument, a pointer to new ones, is null in both halves.
        "prlimit64": [
            _argument(2), *_unless_equal(0, [_REFUSED]), _argument(2, upper=True), *_unless_equal(0, [_REFUSED]),
            _argument(0), *_allow_if_in((0, pid)),
        ],
        # As for a parent outside of the namespace: where there is none, the number would be that of our process.
        "getppid": [_line(_RETURN, _ERRNO | 0)],
        "getpgid": [_argument(0), *_allow_if_in((0, pid))],
        "getsid": [_argument(0), *_allow_if_in((0, pid))],
        "sched_getaffinity": [_argument(0), *_allow_if_in((0, pid))],
    }  # fmt: skip


def _opening(flags: int, *, writes: bool) -> list[bytes]:
    """Return what decides about opening a file.

    Landlock before Linux 6.2 does not see truncation, so it is refused where the file is not opened for writing.
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
    """Load half of an argument. The lower one is all that the kernel uses of an int."""
    return _line(_LOAD, _ARGUMENTS + 8 * index + 4 * upper)


def _if_equal(value: int, body: list[bytes]) -> list[bytes]:
    return [_line(_JUMP_EQUAL, value, 0, len(body)), *body]


def _unless_equal(value: int, body: list[bytes]) -> list[bytes]:
    return [_line(_JUMP_EQUAL, value, len(body), 0), *body]


def _if_any_bit(bits: int, body: list[bytes]) -> list[bytes]:
    return [_line(_JUMP_ANY_BIT, bits, 0, len(body)), *body]


def _allow_if_in(values: tuple[int, ...]) -> list[bytes]:
    return [*(line for value in values for line in _if_equal(value, [_ALLOWED])), _REFUSED]
