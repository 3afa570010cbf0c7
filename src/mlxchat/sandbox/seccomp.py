"""A filter of system calls for programs that are not trusted (Linux, x86-64 and ARM64).

A list of what is allowed, because a list of what is not is never complete: a program may compute, use files that it can
open, and have threads. It can make no process, signal no other one, open no socket, and change no file's owner or mode.
"""

from __future__ import annotations

import platform
import struct

# Classic BPF, <linux/filter.h>, and <linux/seccomp.h>.
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE = 0, 4
_ARGUMENT = (16, 24, 32)
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x00010000
_WRITING = 0x1 | 0x2 | 0x40 | 0x200
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC."""
_HARMLESS_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX."""

# name: (x86-64, ARM64); None where the machine has no such call.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "umask": (95, 166),
    "ftruncate": (77, 46), "fsync": (74, 82), "fdatasync": (75, 83), "flock": (73, 32),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "fcntl": (72, 25),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "eventfd2": (290, 19),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233), "mincore": (27, 232),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "pause": (34, None),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "restart_syscall": (219, 128),
    "futex": (202, 98), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "set_tid_address": (218, 96),
    "rseq": (334, 293), "membarrier": (324, 283), "arch_prctl": (158, None), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getcpu": (309, 168), "exit": (60, 93), "exit_group": (231, 94),
    "wait4": (61, 260), "waitid": (247, 95),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getpgrp": (111, None), "getpgid": (121, 155),
    "getsid": (124, 156), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getgroups": (115, 158), "getrlimit": (97, 163), "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278),
}  # fmt: skip
"""What a program may always do."""

CHANGING: dict[str, tuple[int | None, int | None]] = {
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None), "symlinkat": (266, 36),
    "truncate": (76, 45),
}  # fmt: skip
"""What changes folders and files by their names."""

# These are allowed with some arguments only.
CONDITIONAL: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None), "openat": (257, 56),
    "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
    "ioctl": (16, 29),
}  # fmt: skip

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def make_filter(pid: int, *, writes: bool) -> bytes | None:
    """Return a filter as an array of `struct sock_filter`, None on a machine it is not made for.

    Threads may be started, but no process; signals go to the process itself only; limits are read, of itself only.

    Args:
        pid: of the process.
        writes: whether files may be opened for writing, made and removed: only where something else, which sees paths,
            says which ones.
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
            lines += _if_equal(number, [_line(_RETURN, _ALLOW)])
    refused = _line(_RETURN, _ERRNO | _EPERM)

    def special(name: str, body: list[bytes]) -> list[bytes]:
        number = CONDITIONAL[name][column]
        return [] if number is None else _if_equal(number, body)

    def one_of(argument: int, values: tuple[int, ...]) -> list[bytes]:
        checks = [line for value in values for line in _if_equal(value, [_line(_RETURN, _ALLOW)])]
        return [_line(_LOAD, _ARGUMENT[argument]), *checks, refused]

    def none_of(argument: int, bits: int) -> list[bytes]:
        look = [_line(_LOAD, _ARGUMENT[argument]), _line(_JUMP_ANY_BIT, bits, 1, 0), _line(_RETURN, _ALLOW), refused]
        return [_line(_RETURN, _ALLOW)] if writes else look

    lines += special("open", none_of(1, _WRITING)) + special("openat", none_of(2, _WRITING))
    lines += special(
        "clone",
        [_line(_LOAD, _ARGUMENT[0]), _line(_JUMP_ANY_BIT, _CLONE_THREAD, 0, 1), _line(_RETURN, _ALLOW), refused],
    )
    # Its flags are in memory, where no filter looks: the C library falls back to clone.
    lines += special("clone3", [_line(_RETURN, _ERRNO | _ENOSYS)])
    lines += special("kill", one_of(0, (pid,)))
    lines += special("tgkill", one_of(0, (pid,)))
    lines += special("prlimit64", one_of(0, (0, pid)))
    lines += special("ioctl", one_of(1, _HARMLESS_IOCTLS))
    return b"".join([*lines, refused])


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _if_equal(value: int, body: list[bytes]) -> list[bytes]:
    return [_line(_JUMP_EQUAL, value, 0, len(body)), *body]


def _unless_equal(value: int, body: list[bytes]) -> list[bytes]:
    return [_line(_JUMP_EQUAL, value, len(body), 0), *body]
