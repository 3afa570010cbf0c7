"""Attacks from inside the sandbox by system calls, with all protections and with each one alone."""

import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxchat.errors import StepFailed
from mlxchat.sandbox import programs
from mlxchat.sandbox.programs import ALLOWED, CHANGING, CONDITIONAL, Watch, protections_here, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="attacks by Linux system calls")

COLUMN = 1 if platform.machine() == "aarch64" else 0
# Calls that affect other processes or gain privileges: (x86-64, ARM64).
FORBIDDEN: dict[str, tuple[int, int | None]] = {
    # Signals
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "timer_create": (222, 107), "mq_notify": (244, 184),
    "mq_open": (240, 180), "signalfd4": (289, 74),
    # Other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "setpriority": (141, 140), "getpriority": (140, 141),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "setpgid": (109, 154), "setsid": (112, 157),
    "setns": (308, 268), "unshare": (272, 97), "get_robust_list": (274, 100), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "perf_event_open": (298, 241),
    # Privileges of the process
    "prctl": (157, 167), "seccomp": (317, 277), "capset": (126, 91), "setuid": (105, 146), "setgid": (106, 144),
    "setresuid": (117, 147), "setgroups": (116, 159), "setrlimit": (160, 164), "personality": (135, 92),
    "arch_prctl": (158, None), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "modify_ldt": (154, None), "iopl": (172, None),
    "landlock_create_ruleset": (444, 444), "landlock_restrict_self": (446, 446), "acct": (163, 89),
    "quotactl": (179, 60), "swapon": (167, 224), "reboot": (169, 142), "kexec_load": (246, 104),
    "init_module": (175, 105), "finit_module": (313, 273), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "sethostname": (170, 161),
    # Files
    "flock": (73, 32), "truncate": (76, 45), "link": (86, None), "linkat": (265, 37), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "fchownat": (260, 54), "creat": (85, None), "openat2": (437, 437),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "chroot": (161, 51), "pivot_root": (155, 41),
    "mount": (165, 40), "umount2": (166, 39), "fsopen": (430, 430), "open_tree": (428, 428), "move_mount": (429, 429),
    "mount_setattr": (442, 442), "fanotify_init": (300, 262), "inotify_init": (253, None), "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27), "setxattr": (188, 5), "utimensat": (280, 88), "mincore": (27, 232),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "sync": (162, 81), "syncfs": (306, 267),
    "fallocate": (285, 47), "sendfile": (40, 71), "splice": (275, 76), "vmsplice": (278, 75), "tee": (276, 77),
    "copy_file_range": (326, 285), "lookup_dcookie": (212, 18),
    # Communication
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "recvmsg": (47, 212),
    "setsockopt": (54, 208), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "msgget": (68, 186), "msgsnd": (69, 189), "msgctl": (71, 187),
    "io_setup": (206, 0), "io_submit": (209, 2), "vhangup": (153, 58),
}  # fmt: skip
KILL, TGKILL = (62, 129)[COLUMN], (234, 131)[COLUMN]
FCNTL, IOCTL, FUTEX, CLONE, OPENAT, PRLIMIT = (
    (72, 25)[COLUMN], (16, 29)[COLUMN], (202, 98)[COLUMN], (56, 220)[COLUMN], (257, 56)[COLUMN], (302, 261)[COLUMN],
)  # fmt: skip
# Allowed calls with forbidden arguments; each is refused with EPERM.
ARGUMENTS = {
    "fcntl F_GETLK": (FCNTL, 0, 5), "fcntl F_SETLK": (FCNTL, 0, 6), "fcntl F_SETLKW": (FCNTL, 0, 7),
    "fcntl F_SETOWN": (FCNTL, 0, 8), "fcntl F_GETOWN": (FCNTL, 0, 9), "fcntl F_SETSIG": (FCNTL, 0, 10),
    "fcntl F_SETOWN_EX": (FCNTL, 0, 15), "fcntl F_OFD_SETLK": (FCNTL, 0, 37), "fcntl F_SETLEASE": (FCNTL, 0, 1024),
    "fcntl F_NOTIFY": (FCNTL, 0, 1026), "fcntl F_SETPIPE_SZ": (FCNTL, 0, 1031), "fcntl F_ADD_SEALS": (FCNTL, 0, 1033),
    "fcntl F_SETOWN with upper bits": (FCNTL, 0, 8 | 3 << 32),
    "fcntl F_SETFL O_ASYNC": (FCNTL, 0, 4, 0x2000), "fcntl F_SETFL O_ASYNC and more": (FCNTL, 0, 4, 0x2C00),
    "fcntl F_SETFL O_ASYNC with upper bits": (FCNTL, 0, 4 | 1 << 32, 0x2000 | 1 << 32),
    "ioctl FIOASYNC": (IOCTL, 0, 0x5452), "ioctl FIOSETOWN": (IOCTL, 0, 0x8901), "ioctl SIOCSPGRP": (IOCTL, 0, 0x8902),
    "ioctl TIOCSTI": (IOCTL, 0, 0x5412), "ioctl TIOCSCTTY": (IOCTL, 0, 0x540E), "ioctl TIOCLINUX": (IOCTL, 0, 0x541C),
    "ioctl FIOASYNC with upper bits": (IOCTL, 0, 0x5452 | 1 << 40),
    "futex LOCK_PI": (FUTEX, 0, 6), "futex LOCK_PI private": (FUTEX, 0, 6 | 128),
    "clone as fork": (CLONE, 17), "clone as vfork": (CLONE, 0x4111), "clone with a user namespace": (CLONE, 0x10000000),
    "clone of a thread with more": (CLONE, 0x3D0F00 | 0x20000000), "clone of a thread with a pidfd": (CLONE, 0x3D1F00),
    "close_range with its own file table": (436, 900, 900, 2), "close_range with more": (436, 900, 900, 6),
    "openat O_TRUNC alone": (OPENAT, -100, 0, 0x200), "openat without access": (OPENAT, -100, 0, 3),
    "kill of the group": (KILL, 0, 9), "kill of all": (KILL, -1, 9), "kill of the parent": (KILL, 1, 9),
    "tgkill of the parent": (TGKILL, 1, 1, 9),
    "prlimit64 of the parent": (PRLIMIT, 1, 7, 0, 0), "prlimit64 with new limits": (PRLIMIT, 0, 7, 1, 0),
    "prlimit64 with new limits at a round address": (PRLIMIT, 0, 7, 1 << 32, 0),
    "getpgid of the parent": ((121, 155)[COLUMN], 1), "getsid of the parent": ((124, 156)[COLUMN], 1),
    "sched_getaffinity of the parent": ((204, 123)[COLUMN], 1, 0, 0),
    "getpid of the x32 ABI": (0x40000000 | 39,), "execve of the x32 ABI": (0x40000000 | 520,),
    "ptrace of the x32 ABI": (0x40000000 | 521,), "rt_sigqueueinfo of the x32 ABI": (0x40000000 | 524,),
}  # fmt: skip

PRELUDE = """
import sys
import time
for name in ("ctypes", "_ctypes"):
    sys.modules.pop(name, None)
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    ctypes.set_errno(0)
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result
def tries(*actions):
    for action in actions:
        try:
            action()
        except OSError:
            pass
"""

SIGNALS_BY_PIPE = """
import fcntl
readable, writable = os.pipe()
tries(
    lambda: {own},
    lambda: fcntl.fcntl(readable, 10, 9),  # F_SETSIG
    lambda: {asynchronous},
    lambda: os.write(writable, b"x"),
)
print("finished")
"""
OWN_BY_FCNTL = "fcntl.fcntl(readable, 8, {victim})"  # F_SETOWN
ASYNC_BY_FCNTL = "fcntl.fcntl(readable, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)"
ASYNC_BY_IOCTL = "fcntl.ioctl(readable, 0x5452, b'\\1\\0\\0\\0')"  # FIOASYNC
OWN_BY_OWNER = "fcntl.fcntl(readable, 15, __import__('struct').pack('ii', 1, {victim}))"  # F_SETOWN_EX, F_OWNER_PID
KILLS = {
    "F_SETOWN": SIGNALS_BY_PIPE.format(own=OWN_BY_FCNTL, asynchronous=ASYNC_BY_FCNTL),
    "F_SETOWN_EX": SIGNALS_BY_PIPE.format(own=OWN_BY_OWNER, asynchronous=ASYNC_BY_FCNTL),
    "FIOASYNC": SIGNALS_BY_PIPE.format(own=OWN_BY_FCNTL, asynchronous=ASYNC_BY_IOCTL),
    "kill": "tries(lambda: os.kill({victim}, 9))\nprint('finished')",
    "tkill": f"call({FORBIDDEN['tkill'][COLUMN]}, {{victim}}, 9)\nprint('finished')",
    "tgkill": f"call({TGKILL}, {{victim}}, {{victim}}, 9)\nprint('finished')",
    "pidfd_send_signal": "call(424, call(434, {victim}, 0), 9, None, 0)\nprint('finished')",
}


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user outside the sandbox."""
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


def attack(code: str, victim: subprocess.Popen[bytes], protections: list[str] | None = None) -> str:
    chosen = protections_here() if protections is None else protections
    return run_program(PRELUDE + code.format(victim=victim.pid), seconds=20, protections=chosen).output


def is_killed(victim: subprocess.Popen[bytes]) -> bool:
    """Return whether a process is killed within 0.2 s."""
    try:
        return victim.wait(0.2) == -9
    except subprocess.TimeoutExpired:
        return False


def landlock_version() -> int:
    """Return the version of the kernel's Landlock; 6 has scopes for signals."""
    import ctypes

    return int(ctypes.CDLL(None).syscall(444, None, 0, 1))


def need(*protections: str, landlock: int = 1) -> None:
    """Skip the test on systems without these protections."""
    if not set(protections) <= set(protections_here()):
        pytest.skip(f"no {' or '.join(protections)} on this system")
    if "landlock" in protections and landlock_version() < landlock:
        pytest.skip(f"Landlock is older than version {landlock}")


@pytest.mark.parametrize("protections", [None, "namespaces", "landlock", "seccomp"])
@pytest.mark.parametrize("name", KILLS)
def test_no_signal_reaches_a_process_outside(name, protections, victim):
    """All protections together (None), and each one alone."""
    need(*([protections] if protections else []), landlock=6)
    if not {"seccomp", "landlock", "namespaces"} & set(protections_here()):
        pytest.skip("this system has only limits")
    output = attack(KILLS[name], victim, [protections] if protections else None)
    assert output.splitlines()[-1:] == ["finished"], output
    assert not is_killed(victim)


@pytest.mark.parametrize("name", KILLS)
def test_attacks_kill_without_protections(name, victim):
    """The control of the test above."""
    attack(KILLS[name], victim, protections=[])
    assert is_killed(victim)


def test_forbidden_calls_and_arguments_are_refused():
    need("seccomp")
    calls = {name: (numbers[COLUMN], *[-1] * 6) for name, numbers in FORBIDDEN.items() if numbers[COLUMN] is not None}
    calls |= {name: call for name, call in ARGUMENTS.items() if COLUMN == 0 or "x32" not in name}
    code = f"{PRELUDE}\nfor name, arguments in {calls!r}.items():\n    print(name, call(*arguments), sep='=')"
    outcome = run_program(code, seconds=20)
    assert outcome.passed, outcome.output
    assert dict(line.rsplit("=", 1) for line in outcome.output.splitlines()) == dict.fromkeys(calls, "EPERM")


def test_unlisted_calls_are_refused():
    need("seccomp")
    listed = {numbers[COLUMN] for numbers in [*ALLOWED.values(), *CHANGING.values(), *CONDITIONAL.values()]}
    # uretprobe and uprobe of x86 bypass filters; the kernel kills processes that call them.
    unlisted = [number for number in range(1024) if number not in {*listed, 335, 336}]
    code = f"{PRELUDE}\nprint({{call(number, *[-1] * 6) for number in {unlisted}}})"
    assert run_program(code, seconds=20).output == "{'EPERM'}\n"
    assert len(unlisted) > 900


def test_clone3_and_the_parent_are_hidden():
    """The flags of clone3 are in memory, so the C library must fall back to clone."""
    need("seccomp")
    assert run_program(f"{PRELUDE}\nprint(call(435, 0, 0), os.getppid())").output == "ENOSYS 0\n"


def test_memory_of_another_process_cannot_be_read(victim):
    if not {"seccomp", "landlock", "namespaces"} & set(protections_here()):
        pytest.skip("this system has only limits")
    code = """
for pid in ({victim}, os.getppid()):
    for name in ("mem", "maps", "environ", "cmdline", "stat", "fd", "root", "cwd"):
        try:
            place = f"/proc/{{pid}}/{{name}}"
            print(name, os.listdir(place) if name in "fd root cwd" else open(place).read(9))
        except OSError as error:
            assert error.errno in (errno.ENOENT, errno.EACCES), error
"""
    assert attack(code, victim) == ""


PROBES = """
import os, socket
def probe(name, action):
    try:
        action()
        print(name)
    except OSError:
        pass
def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
probe("find", lambda: os.stat({file!r}))
probe("read", lambda: open({file!r}).read())
probe("write", lambda: open({file!r}, "a"))
probe("signal", lambda: os.kill({victim}, 0))
probe("cut", lambda: os.truncate({file!r}, 1))
probe("connect", lambda: socket.create_connection(("127.0.0.1", {port}), 1))
probe("fork", fork)
"""
POSSIBLE = {
    (): "find read write signal cut connect fork",
    ("namespaces",): "fork",
    ("landlock",): "find fork",
    ("seccomp",): "find read",
    ("landlock", "seccomp"): "find",
    ("namespaces", "landlock", "seccomp"): "",
}


def find_possible(protections: tuple[str, ...], victim: subprocess.Popen[bytes], folder: Path) -> list[str]:
    """Return the names of the probes that succeed with exactly these protections."""
    file = folder / "file"
    file.write_text("text")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = PROBES.format(file=str(file), victim=victim.pid, port=server.getsockname()[1])
        outcome = run_program(code, seconds=20, protections=protections)
    assert outcome.passed, outcome.output
    assert outcome.protections == ("limits", *protections)
    return outcome.output.split()


@pytest.mark.parametrize("protections", POSSIBLE, ids=lambda names: "+".join(names) or "limits")
def test_what_each_protection_leaves_possible(protections, victim, tmp_path):
    """These are the rows of the table in docs/internals/security.md."""
    need(*protections, landlock=6)
    assert find_possible(protections, victim, tmp_path) == POSSIBLE[protections].split()


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (("limits", "namespaces", "seccomp"), False),
        (("limits", "namespaces", "landlock"), False),
        (("limits", "landlock", "seccomp"), True),
        (("limits", "sandbox-exec"), True),
    ],
)
def test_humaneval_needs_confinement(found, holds, monkeypatch):
    from mlxchat.tasks import load_task

    monkeypatch.setattr(programs, "protections_here", lambda: found)
    load_task("humaneval", "test", unconfined=1.0).check()
    if holds:
        load_task("humaneval", "test").check()
        return
    with pytest.raises(StepFailed, match=rf"in force here: {', '.join(found)}\. Leave the task out, or accept"):
        load_task("humaneval", "test").check()
    talk = {"messages": [{"content": ""}], "entry_point": "f", "test": ""}
    with pytest.raises(StepFailed):
        load_task("humaneval", "test").evaluate(talk, "")


def test_only_pythons_files_exist_in_namespaces(tmp_path):
    """Landlock alone does not hide that a file exists, and its size."""
    need("namespaces")
    secret = tmp_path / "secret"
    secret.write_text("text")
    code = f"""
import os
for path in ({str(secret)!r}, "/proc/self", "/sys/kernel", "/etc/passwd", "/run", "/var", "/dev/shm"):
    print(path) if os.path.lexists(path) else None
assert os.stat(".").st_size is not None and os.path.exists("/dev/null")
try:
    open(os.__file__, "a")
except OSError:
    print("read-only")
"""
    outcome = run_program(code, protections=["namespaces"])
    assert (outcome.passed, outcome.output) == (True, "read-only\n")
    assert outcome.protections == ("limits", "namespaces")


@pytest.mark.parametrize("protections", [("namespaces",), ("landlock",)], ids="+".join)
def test_files_beside_a_venv_cannot_be_read(protections, tmp_path):
    """After `python -m venv .` sys.prefix is the whole project."""
    need(*protections)
    import venv

    import mlxchat

    venv.create(tmp_path)
    secret = tmp_path / ".env"
    secret.write_text("text")
    program = f"import json, zoneinfo\ntry:\n    open({str(secret)!r})\nexcept OSError:\n    print('no')"
    code = (
        "from mlxchat.sandbox.programs import run_program\n"
        f"print(run_program({program!r}, seconds=20, protections={protections!r}).output)"
    )
    source = str(Path(mlxchat.__file__).parents[1])
    done = subprocess.run(
        [tmp_path / "bin/python", "-c", code], env={"PYTHONPATH": source}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["no"], done


def test_program_in_namespaces_sees_no_other_process():
    need("namespaces")
    code = """
import os
found = []
for pid in range(1, 100_000):
    try:
        os.kill(pid, 0)
        found.append(pid)
    except ProcessLookupError:
        pass
print(found, os.getpid(), os.getppid(), os.getsid(0), os.getpgid(0))
"""
    # 1 waits for the program, which is 2 and has a second thread; the session leader is outside, so its id is 0.
    assert run_program(code, seconds=20, protections=["namespaces"]).output == "[1, 2, 3] 2 1 0 0\n"


def test_program_has_no_capabilities():
    """Also without namespaces and as root."""
    need("landlock")
    code = f"""
import struct
header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
assert call({(125, 90)[COLUMN]}, header, data) == 0
print(data.raw == bytes(24))
"""
    assert run_program(PRELUDE + code, protections=[]).output == "True\n"


def test_program_inherits_no_files():
    """It has its standard files and the pipes of the verdict."""
    kinds = """
import os, stat
for file in range(2000):
    try:
        mode = os.fstat(file).st_mode
        print("pipe" if stat.S_ISFIFO(mode) else "device" if stat.S_ISCHR(mode) else mode)
    except OSError:
        pass
"""
    with Path(os.devnull).open() as inherited:
        os.set_inheritable(inherited.fileno(), True)
        assert run_program(kinds).output.split() == ["device", "pipe", "pipe", "pipe", "pipe"]


THREADS = """
import mmap
# clone(flags, stack, ...) by hand: each thread takes 64 bytes and sleeps in pause().
memory = mmap.mmap(-1, 1 << 20, prot=7)
memory.write(bytes.fromhex("b838000000 4d31d2 4d31c0 0f05 85c0 7509 b822000000 0f05 ebf7 c3"))
place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
clone = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)(place)
made = 0
while made < 2500 and clone(0x3D0F00, place + 65536 + 64 * made, place + 8192) > 0:
    made += 1
print(made)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86")
def test_threads_are_limited_for_root():
    """RLIMIT_NPROC exempts root, so without a change of user a program could take every process id."""
    outcome = run_program(PRELUDE + THREADS, seconds=20)
    assert 0 < int(outcome.output) < 2000


@pytest.mark.parametrize("counted", [True, False], ids=["by the kernel", "in the folder"])
def test_written_bytes_are_limited_without_namespaces(counted, monkeypatch):
    """RLIMIT_FSIZE limits only the size of each file."""
    need("landlock", "seccomp")
    if not counted:
        monkeypatch.setattr(Watch, "written", lambda self: None)
    code = """
for index in range(60):
    with open(str(index), "wb") as file:
        file.write(bytes(2 << 20))
import time
time.sleep(15)
"""
    assert run_program(code, seconds=20, protections=["landlock", "seccomp"]).status == "output"


HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", HEADERS)
def test_call_numbers_equal_the_kernel_headers(machine):
    header, column = Path(HEADERS[machine]), [*HEADERS].index(machine)
    if not header.is_file():
        pytest.skip("the kernel's headers are not here")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", header.read_text()))
    found |= {"newfstatat": found["fstatat"]} if "fstatat" in found else {}
    ours = {**ALLOWED, **CHANGING, **CONDITIONAL}
    for name, numbers in {**FORBIDDEN, **ours}.items():
        number = numbers[column]
        assert number is None or int(found[name] if name in ours else found.get(name, number)) == number, name
        assert number is not None or name not in ours or column == 1, name


@pytest.mark.parametrize("protections", [("namespaces", "landlock", "seccomp"), ("landlock", "seccomp")], ids=len)
def test_program_dies_with_its_parent(protections, tmp_path):
    need(*protections)
    code = (
        f"import tempfile\ntempfile.tempdir = {str(tmp_path)!r}\n"
        "from mlxchat.sandbox.programs import run_program\n"
        f"run_program('while True:\\n    pass', seconds=60, protections={protections!r})"
    )

    def running() -> list[str]:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if str(place.joinpath("cwd").readlink()).startswith(str(tmp_path)):
                    found.append(place.name)
            except OSError:
                continue
        return found

    expected = 3 if "namespaces" in protections else 1  # with two processes that wait for it
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        until = time.monotonic() + 60
        while len(running()) < expected and time.monotonic() < until:
            time.sleep(0.05)
        assert len(running()) == expected
        parent.kill()
    until = time.monotonic() + 60
    while running() and time.monotonic() < until:
        time.sleep(0.05)
    assert running() == []
