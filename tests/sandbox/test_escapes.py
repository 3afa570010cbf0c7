"""Attacks from inside the sandbox by system calls, with all protections and with each one alone."""

import ctypes
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from kit.commands import processes_in, wait_until
from mlxchat.errors import StepFailed
from mlxchat.sandbox import programs
from mlxchat.sandbox.programs import ALLOWED, CHANGING, CONDITIONAL, protections_here, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="attacks by Linux system calls")

COLUMN = 1 if platform.machine() == "aarch64" else 0
# Calls that affect other processes, gain privileges or communicate.
FORBIDDEN = {
    "tkill", "rt_sigqueueinfo", "pidfd_open", "pidfd_send_signal", "fork", "vfork", "execve", "execveat", "ptrace",
    "process_vm_readv", "setpriority", "setsid", "setns", "unshare", "prctl", "seccomp", "setuid", "setrlimit",
    "keyctl", "bpf", "io_uring_setup", "truncate", "linkat", "fchmod", "fchown", "open_by_handle_at", "chroot", "mount",
    "mq_open", "inotify_add_watch", "memfd_create", "socket", "connect", "sendmsg", "shmget", "reboot",
}  # fmt: skip
TGKILL = (234, 131)[COLUMN]
FCNTL, IOCTL, CLONE, OPENAT, PRLIMIT, KILL = (
    (72, 25)[COLUMN], (16, 29)[COLUMN], (56, 220)[COLUMN], (257, 56)[COLUMN], (302, 261)[COLUMN], (62, 129)[COLUMN],
)  # fmt: skip
# Allowed calls with forbidden arguments; each is refused with EPERM.
ARGUMENTS = {
    "fcntl F_SETLK": (FCNTL, 0, 6), "fcntl F_SETOWN": (FCNTL, 0, 8), "fcntl F_SETOWN_EX": (FCNTL, 0, 15),
    "fcntl F_SETOWN with upper bits": (FCNTL, 0, 8 | 3 << 32), "fcntl F_SETFL O_ASYNC": (FCNTL, 0, 4, 0x2000),
    "ioctl FIOASYNC": (IOCTL, 0, 0x5452), "ioctl TIOCSTI": (IOCTL, 0, 0x5412),
    "ioctl FIOASYNC with upper bits": (IOCTL, 0, 0x5452 | 1 << 40),
    "clone as fork": (CLONE, 17), "clone with a user namespace": (CLONE, 0x10000000),
    "clone of a thread with a pidfd": (CLONE, 0x3D1F00), "openat O_TRUNC alone": (OPENAT, -100, 0, 0x200),
    "kill of all": (KILL, -1, 9), "kill of the parent": (KILL, 1, 9), "tgkill of the parent": (TGKILL, 1, 1, 9),
    "prlimit64 of the parent": (PRLIMIT, 1, 7, 0, 0), "prlimit64 with new limits": (PRLIMIT, 0, 7, 1, 0),
    "execve of the x32 ABI": (0x40000000 | 520,), "ptrace of the x32 ABI": (0x40000000 | 521,),
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
    lambda: fcntl.fcntl(readable, 8, {victim}),  # F_SETOWN
    lambda: fcntl.fcntl(readable, 10, 9),  # F_SETSIG
    lambda: fcntl.fcntl(readable, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK),
    lambda: os.write(writable, b"x"),
)
print("finished")
"""
KILLS = {
    "F_SETOWN": SIGNALS_BY_PIPE,
    "kill": "tries(lambda: os.kill({victim}, 9))\nprint('finished')",
    "tgkill": f"call({TGKILL}, {{victim}}, {{victim}}, 9)\nprint('finished')",
    "pidfd_send_signal": "call(424, call(434, {victim}, 0), 9, None, 0)\nprint('finished')",
}


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user outside the sandbox."""
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


def is_killed(victim: subprocess.Popen[bytes]) -> bool:
    """Return whether a process is killed within 0.2 s."""
    try:
        return victim.wait(0.2) == -9
    except subprocess.TimeoutExpired:
        return False


def need(*protections: str, landlock: int = 1) -> None:
    """Skip the test on systems without these protections; version 6 of Landlock has scopes for signals."""
    if not set(protections) <= set(protections_here()):
        pytest.skip(f"no {' or '.join(protections)} on this system")
    if "landlock" in protections and ctypes.CDLL(None).syscall(444, None, 0, 1) < landlock:
        pytest.skip(f"Landlock is older than version {landlock}")


@pytest.mark.parametrize("protections", ["", "namespaces", "landlock", "seccomp"])
@pytest.mark.parametrize("name", KILLS)
def test_no_signal_reaches_a_process_outside(name, protections, victim):
    """Each protection alone prevents what no protection ("") allows."""
    need(*protections.split(), landlock=6)
    code = PRELUDE + KILLS[name].format(victim=victim.pid)
    output = run_program(code, seconds=20, protections=protections.split()).output
    assert is_killed(victim) == (not protections)
    assert output.splitlines()[-1:] == ["finished"], output


def test_forbidden_arguments_are_refused():
    need("seccomp")
    calls = {name: call for name, call in ARGUMENTS.items() if COLUMN == 0 or "x32" not in name}
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
    assert not FORBIDDEN & {*ALLOWED, *CHANGING, *CONDITIONAL}


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


@pytest.mark.parametrize("protections", POSSIBLE, ids=lambda names: "+".join(names) or "limits")
def test_what_each_protection_leaves_possible(protections, victim, tmp_path):
    """These are the rows of the table in docs/internals/security.md."""
    need(*protections, landlock=6)
    file = tmp_path / "file"
    file.write_text("text")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = PROBES.format(file=str(file), victim=victim.pid, port=server.getsockname()[1])
        outcome = run_program(code, seconds=20, protections=protections)
    assert outcome.protections == ("limits", *protections)
    assert outcome.output.split() == POSSIBLE[protections].split()


@pytest.mark.parametrize(
    ("found", "holds"), [(("limits", "namespaces", "seccomp"), False), (("limits", "landlock", "seccomp"), True)]
)
def test_humaneval_needs_confinement(found, holds, monkeypatch):
    from mlxchat.tasks import load_task

    monkeypatch.setattr(programs, "protections_here", lambda: found)
    load_task("humaneval", "test", unconfined=1.0).check()
    with nullcontext() if holds else pytest.raises(StepFailed, match=f"in force here: {', '.join(found)}"):
        load_task("humaneval", "test").check()


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


def test_written_bytes_are_limited_without_namespaces():
    """RLIMIT_FSIZE limits only the size of each file."""
    need("landlock", "seccomp")
    code = """
for index in range(60):
    with open(str(index), "wb") as file:
        file.write(bytes(2 << 20))
import time
time.sleep(15)
"""
    assert run_program(code, seconds=20, protections=["landlock", "seccomp"]).status == "output"


@pytest.mark.parametrize("protections", [("namespaces", "landlock", "seccomp"), ("landlock", "seccomp")], ids=len)
def test_program_dies_with_its_parent(protections, tmp_path):
    need(*protections)
    code = (
        f"import tempfile\ntempfile.tempdir = {str(tmp_path)!r}\n"
        "from mlxchat.sandbox.programs import run_program\n"
        f"run_program('while True:\\n    pass', seconds=60, protections={protections!r})"
    )

    count = 3 if "namespaces" in protections else 1  # with two processes that wait for it
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        wait_until(lambda: len(processes_in(tmp_path)) == count, seconds=60)
        parent.kill()
    wait_until(lambda: processes_in(tmp_path) == [], seconds=60)
