"""One execution of a program that is not trusted: its process, the pipes to and from it, and its end."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from mlxchat.errors import StepFailed
from mlxchat.sandbox.seccomp import make_filter
from mlxchat.sandbox.watch import Watch

PROTECTIONS = ("namespaces", "landlock", "seccomp", "sandbox-exec")
"""What may be in force besides the limits, which always are."""

_CHILD = Path(__file__).with_name("child.py")
_MOST_OUTPUT_BYTES = 1 << 20
_KEPT_OUTPUT_BYTES = 16 << 10
_LONGEST_SAYING = 256
_MOST_FILE_BYTES = 4 << 20
_MOST_WRITTEN_BYTES = 64 << 20  # over all files, where the folder is not a small file system of its own
_MOST_ENTRIES = 1000  # files, folders and links, as in that file system
_MOST_PROCESSES = 32
_START_SECONDS = 60.0  # an interpreter starts in 0.05; a busy machine may take its time
_LOOK_SECONDS = 0.1
_PID_IN_NAMESPACE = 2  # the first process there only waits for it
_SANDBOX_EXEC = "/usr/bin/sandbox-exec"


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool
    """Whether the whole program was executed, its last line included."""
    status: str
    """passed, failed (an error, an early exit), timeout, memory or output (it printed or wrote too much)."""
    output: str
    """What it printed, errors included; the first 16 KiB."""
    seconds: float = 0.0
    """Wall clock from its first line on."""
    protections: tuple[str, ...] = ()
    """What was in force: limits, and any of `PROTECTIONS`."""


@dataclass
class Run:
    """One execution: the process, and the pipes to and from it."""

    folder: Path
    code: str
    seconds: float
    memory_bytes: int
    protections: tuple[str, ...]
    output: bytearray = field(default_factory=bytearray)
    said: bytearray = field(default_factory=bytearray)
    """What came through the verdict's pipe and was not looked at yet."""
    printed_bytes: int = 0
    in_force: tuple[str, ...] | None = None
    """None until the interpreter says that it is about to run the program."""
    confined: bool = False
    """Whether the program can start no other process, so that none has to be looked for."""
    ready_at: float = 0.0
    """When the program began."""

    def follow(self) -> Outcome:
        """Start the process and return its outcome, with the process and all its descendants gone."""
        reading, writing = os.pipe()
        try:
            process = self._start(writing)
        except OSError as error:
            os.close(reading)
            raise StepFailed(f"programs cannot be executed: {sys.executable} does not start ({error})") from None
        finally:
            os.close(writing)
        began = time.monotonic()
        watch = Watch(process.pid)
        try:
            status = self._watch(process, reading, watch)
        finally:
            self._end(process, watch)
            os.close(reading)
        if self.in_force is None:
            what = f"after {time.monotonic() - began:.0f} s it had said: {self._text() or 'nothing'}"
            raise StepFailed(f"programs cannot be executed: {sys.executable} does not start ({what})")
        return Outcome(status == "passed", status, self._text(), time.monotonic() - self.ready_at, self.in_force)

    def _start(self, verdict: int) -> subprocess.Popen[bytes]:
        # What -I means, but with the one variable that makes sets and hashes the same every time.
        command = [sys.executable, "-P", "-s", "-S", str(_CHILD), str(verdict)]
        self.wrapped = "sandbox-exec" in self.protections and os.access(_SANDBOX_EXEC, os.X_OK)
        if self.wrapped:
            command = [_SANDBOX_EXEC, "-p", mac_profile(self.folder), *command]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.folder,
            env={"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"},  # an arena for each thread would count as memory
            pass_fds=[verdict], start_new_session=True,
        )  # fmt: skip
        self.question, self.secret = secrets.token_hex(16).encode(), secrets.token_hex(16).encode()
        filters: dict[str, str | None] = {}
        for pid in (process.pid, _PID_IN_NAMESPACE):
            for writes in (True, False):
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

    def _watch(self, process: subprocess.Popen[bytes], verdict: int, watch: Watch) -> str:
        """Feed and read the process until it has ended or has to be ended; return the status."""
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
                    self.said += part
                    if self.in_force is None and b"\n" in self.said:
                        self._begin()
                        with contextlib.suppress(OSError):
                            os.write(sending, self.question)
                        deadline = self.ready_at + self.seconds
                    if not self._is_expected(answered):
                        return "failed"  # the program found the pipe and writes to it
                    if self.in_force is not None and not answered and bytes(self.said) == self.question:
                        answered = True
                        self.said.clear()
                        with contextlib.suppress(OSError):
                            os.write(sending, self.secret)
                    elif not part:
                        return self._verdict(answered, process, printed)
                if self.printed_bytes > _MOST_OUTPUT_BYTES:
                    return "output"
                if self.in_force is not None and time.monotonic() > look_at:
                    look_at = time.monotonic() + _LOOK_SECONDS
                    if not self.confined and watch.look() > self.memory_bytes:
                        return "memory"
                    # In namespaces the first process is not the one that writes.
                    written = 0 if "namespaces" in self.in_force else watch.written() or 0
                    if written > _MOST_WRITTEN_BYTES or self._is_folder_full():
                        return "output"
        self._drain(printed)
        return "timeout"

    def _is_folder_full(self) -> bool:
        """Tell whether too much lies in the folder, also where the system may not count it as written.

        It does not count folders, links and empty files, and for root it may not count at all (`Watch.written`). A
        small file system of the program's own is not seen from here: then the folder is empty.
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
            except OSError:  # closed to us, or deeper than a path may be long
                return True
        return False

    def _verdict(self, answered: bool, process: subprocess.Popen[bytes], printed: int) -> str:
        """Return the status of a program that will say nothing more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)  # how it ended is worth a moment
        self._drain(printed)
        if self.printed_bytes > _MOST_OUTPUT_BYTES:
            return "output"
        if answered and hmac.compare_digest(bytes(self.said), self.secret):
            return "passed"
        if bytes(self.said) == b"memory":
            return "memory"
        return "timeout" if process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU) else "failed"

    def _is_expected(self, answered: bool) -> bool:
        """Say whether what came through the verdict's pipe begins what the code around the program says."""
        if self.in_force is None:
            return len(self.said) < _LONGEST_SAYING
        sayings = (self.secret,) if answered else (self.question, b"memory", b"raised")
        return any(saying.startswith(self.said) for saying in sayings)

    def _begin(self) -> None:
        first, _, rest = bytes(self.said).partition(b"\n")
        own = ("sandbox-exec",) if self.wrapped else ()
        self.in_force = (*(name for name in first.decode().split(",") if name), *own)
        self.confined = "seccomp" in self.in_force
        self.said[:] = rest
        self.ready_at = time.monotonic()

    def _send(self, sending: int) -> bool:
        """Send some of the orders; return whether there are more."""
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
        """Take what was printed last."""
        while self.printed_bytes <= _MOST_OUTPUT_BYTES and (part := _read(printed)):
            self._keep(part)

    def _end(self, process: subprocess.Popen[bytes], watch: Watch) -> None:
        """Kill the group, and what left it."""
        if self.in_force is None or not self.confined:
            watch.look()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self.in_force is None or not self.confined:
            watch.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _text(self) -> str:
        return self.output.decode("utf-8", errors="replace")


def _processes_here() -> int:
    """Return the number of processes and threads of this machine, which may count against the user's limit."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    except OSError:
        return 0


def _readable() -> list[str]:
    """Return the files and folders that an interpreter without site-packages needs.

    Of a prefix it is some folders only: all of it may be a project (python -m venv .) or a home folder.
    """
    system = {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"}
    parts = ("lib", "lib64", "share/zoneinfo", "Python", "Resources")  # the last two of a framework (macOS)
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
    """Return what is in a pipe now: nothing also where its end is."""
    try:
        return os.read(pipe, 1 << 16)
    except OSError:
        return b""
