"""Detection of lost ranks: besides MLX's collectives, each rank has a TCP connection to rank 0.

MLX's ring waits for ever for a rank that hangs, keeps a core busy while it waits, and cannot be interrupted. So the
handshake, the wake-up before each call, a heartbeat every second, signals and the end use these connections. The kernel
closes them when a process dies; missing heartbeats reveal a rank that hangs or lost its network.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import platform
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from mlxchat import __version__
from mlxchat.errors import ConfigError, PeerLost, StepFailed

Message = dict[str, Any]
Facts = dict[str, Any]

BEAT_SECONDS = 1.0
# Heartbeats come every second; a machine that swaps may take longer.
SILENCE_SECONDS = float(os.environ.get("MLXCHAT_SILENCE_SECONDS", "15"))
_CODE_SECONDS = 2.0
_CAUSE_SECONDS = 3.0
_END_SECONDS = 5.0
# Rank 0 is killed if it is still in a call this long after a rank was lost.
_NOTICE_SECONDS = 20.0
_LOOK_SECONDS = 0.1
_LONGEST_MESSAGE = 65_536

# Facts that must be equal on all ranks → their names in messages.
_EQUAL = {"mlxchat": "mlxchat", "code": "code of mlxchat (digest)", "mlx": "MLX", "backend": "backend"}


class Line:
    """Messages to and from another process: JSON, one per line."""

    def __init__(self, connection: socket.socket) -> None:
        """`connection` is a connected socket."""
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        self._socket, self._sending, self._received = connection, threading.Lock(), b""
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)

    def send(self, message: Message) -> None:
        """Send a message without blocking; it is dropped if the connection is closed or its buffer is full."""
        with self._sending, suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)

    def receive(self, seconds: float) -> Message | None:
        """Return the next message, or None after `seconds`.

        Raises:
            OSError: the connection ended.
            ValueError: the message is not a JSON object.
        """
        until = time.monotonic() + seconds
        while b"\n" not in self._received:
            # Poll at least once: messages that came while this process was stopped are read first.
            if not self._readable.poll(max(0.0, until - time.monotonic()) * 1000):
                return None
            data = self._socket.recv(_LONGEST_MESSAGE)
            if not data or len(self._received) > _LONGEST_MESSAGE:
                raise ConnectionError("the connection was closed")
            self._received += data
        text, _, self._received = self._received.partition(b"\n")
        message = json.loads(text)
        if not isinstance(message, dict):
            raise ValueError("a message is a JSON object")
        return message

    def listen(
        self, on_message: Callable[[Message], None], on_end: Callable[[str], None], patience: float = math.inf
    ) -> None:
        """Start a thread that sends a heartbeat every second and calls `on_message` with every message.

        It calls `on_end("")` when the connection ends, or with a text when nothing arrives for `patience` seconds.
        """

        def work() -> None:
            heard, next_beat = time.monotonic(), 0.0
            while True:
                if (now := time.monotonic()) >= next_beat:
                    self.send({"kind": "beat"})
                    next_beat = now + BEAT_SECONDS
                try:
                    message = self.receive(next_beat - now)
                except (OSError, ValueError):
                    return on_end("")
                if message is not None:
                    heard = time.monotonic()
                    on_message(message)
                elif time.monotonic() - heard > patience:
                    return on_end(f"has sent nothing for {patience:g} seconds")

        threading.Thread(target=work, name="line", daemon=True).start()

    def close(self) -> None:
        """Close the connection, also for a thread that reads it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(address: tuple[str, int], seconds: float) -> Line:
    """Return a line to the process at an address, retrying for `seconds`.

    Raises:
        OSError: no process listens there.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return Line(socket.create_connection(address, timeout=max(1.0, min(10.0, seconds))))
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def listen_at(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 lets the kernel choose one.

    Raises:
        OSError: the port is in use, or the address does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=64)


class Watch:
    """Rank 0's lines to all other ranks."""

    def __init__(self, facts: Facts, size: int, token: str = "") -> None:
        """`facts`: of this process; `size`: number of ranks; `token`: the secret that the others present."""
        self.size, self._token = size, token
        self.facts: dict[int, Facts] = {0: facts}
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        """Processes of ranks that this process started."""
        self.work: Path | None = None
        """Work folder of the step."""
        self.on_stop: Callable[[int], object] = lambda number: None
        """Called with the signal that another rank received."""
        self.on_loss: Callable[[], None] = lambda: None
        """Called once when a rank is lost."""
        self.is_calling: Callable[[], bool] = lambda: True
        """Returns whether the main thread is in a call to all ranks."""
        self.loss: str | None = None
        """Description of the first lost rank."""
        self._lines: dict[int, Line] = {}
        self._lost, self._noticed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._failures: dict[int, str] = {}
        """Rank → its error."""
        self._over = False

    def gather(self, listener: socket.socket, seconds: float, check: Callable[[], None], where: list[str]) -> None:
        """Wait until all other ranks have connected, compare their versions, and let them continue.

        `check` is called repeatedly and may raise; `where` has the hosts of all ranks, if known.

        Raises:
            ConfigError: a rank has other versions, other code or another backend.
            StepFailed: one did not connect.
        """
        until = time.monotonic() + seconds
        listener.settimeout(0.1)
        while len(self._lines) < self.size - 1:
            check()
            if time.monotonic() > until:
                missing = [rank for rank in range(1, self.size) if rank not in self._lines]
                names = ", ".join(f"rank {rank}" + (f" ({where[rank]})" if where else "") for rank in missing)
                raise StepFailed(
                    f"{names} did not connect within {seconds:g} seconds. Check that the same command runs there."
                )
            with suppress(TimeoutError):
                line = Line(listener.accept()[0])
                # In a thread, so that a connection that sends nothing delays no other.
                threading.Thread(target=self._greet, args=(line,), name="hello", daemon=True).start()
        own, wrong = self.facts[0], list[str]()
        for other in self.facts.values():
            if different := [key for key in _EQUAL if other.get(key) != own[key]]:
                wrong.append(f"{describe_rank(other)} cannot work with rank 0 on {own['host']}:")
                wrong += [f"  {_EQUAL[key]} is {other.get(key)!s} there and {own[key]!s} here" for key in different]
        if wrong:
            raise ConfigError("\n".join([*wrong, "All ranks need the same mlxchat, MLX and backend."]))
        self._send({"kind": "welcome", "host": own["host"]})

    def begin(self) -> None:
        """Start reading messages and detecting lost ranks."""
        for rank, line in self._lines.items():
            line.listen(partial(self._hear, rank), partial(self._miss, rank), SILENCE_SECONDS)

    def wake(self) -> None:
        """Announce a call to all ranks.

        Raises:
            PeerLost: a rank is lost.
        """
        if self.loss is not None:
            raise PeerLost(self.explain())
        self._send({"kind": "call"})

    def explain(self, error: object = None) -> str:
        """Return which rank was lost and where the same command resumes, after a short wait for reports.

        From then on SIGTERM is ignored, because mlx.launch sends it to all ranks when one has ended; the caller ends
        the run.
        """
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._lost.wait(_CAUSE_SECONDS)
        self._noticed.set()
        loss = self.loss or f"the connection between the ranks broke ({error})"
        saved = sorted(self.work.glob("[0-9]" * 8)) if self.work is not None else []
        where = f"iteration {int(saved[-1].name)}" if saved else "the last saved state"
        return f"{loss}. All ranks have ended. The same command continues from {where}."

    def end(self) -> None:
        """End all ranks normally."""
        self._over = True
        self._send({"kind": "end"})
        for child in self.children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(_END_SECONDS)
        self.leave()

    def leave(self) -> None:
        """Close all lines, which ends the ranks, and kill those that this process started."""
        with self._lock:
            self._over = True
            lines = list(self._lines.values())
        for line in lines:
            line.close()
        for child in self.children.values():
            child.kill()
        for child in self.children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(_CODE_SECONDS)

    def _send(self, message: Message) -> None:
        for line in self._lines.values():
            line.send(message)

    def _greet(self, line: Line) -> None:
        """Accept a connection with the token and a missing rank; close any other."""
        message: Message = {}
        with suppress(OSError, ValueError):
            message = line.receive(10.0) or {}
        knows = hmac.compare_digest(str(message.get("token", "")).encode(), self._token.encode())
        facts = message.get("facts")
        rank = facts.get("rank") if isinstance(facts, dict) else None
        with self._lock:
            if knows and isinstance(rank, int) and 0 < rank < self.size and rank not in self._lines and not self._over:
                self.facts[rank] = {"host": "?", "pid": "?", **cast(dict[str, Any], facts)}
                self._lines[rank] = line
                return
        line.close()

    def _hear(self, rank: int, message: Message) -> None:
        kind = message.get("kind")
        if kind == "stop":
            self.on_stop(signal.SIGINT if message.get("signal") == signal.SIGINT else signal.SIGTERM)
        elif kind == "failed":
            self._failures[rank] = str(message.get("text"))

    def _miss(self, rank: int, silence: str) -> None:
        """Record how a rank with a closed or silent line was lost, and end the run."""
        if self._over:
            return
        if silence:
            how = f"{silence}: it hangs, was stopped, or lost its network"
        elif rank in self._failures:
            how = f"failed: {self._failures[rank]}"
        else:
            code = None
            if rank in self.children:
                with suppress(subprocess.TimeoutExpired):
                    code = self.children[rank].wait(_CODE_SECONDS)
            how = how_ended(code)
        with self._lock:
            if self._over or self.loss is not None:
                return
            self.loss = f"{describe_rank(self.facts[rank])} {how}"
        self._lost.set()
        self._send({"kind": "abort"})
        self.on_loss()
        waited = 0.0
        # The main thread raises in its collective or at its next call; a save in between is completed.
        while waited < _NOTICE_SECONDS and not self._noticed.wait(_LOOK_SECONDS):
            waited += _LOOK_SECONDS if self.is_calling() else 0.0
        if not self._noticed.is_set():
            text = f"error: {self.loss}.\n       The same command continues from the last saved state."
            with suppress(OSError, ValueError):
                print(text, file=sys.stderr, flush=True)
            self.leave()
            os._exit(1)


class Follower:
    """Another rank's line to rank 0. The rank ends with it, and forwards signals to rank 0, which saves."""

    def __init__(self, line: Line, host: str, *, is_here: bool, says: bool) -> None:
        """Start reading the line.

        Args:
            line: to rank 0.
            host: of rank 0.
            is_here: whether rank 0 is on this host: then the kernel reports its end, and silence is allowed, because a
                stopped process may continue.
            says: whether this rank reports a lost rank 0 on the terminal.
        """
        self._line, self._host, self._says = line, host, says
        self._calls: queue.Queue[bool] = queue.Queue()
        self.wait: Callable[[], bool] = self._calls.get
        """Returns True when rank 0 calls, False at the end."""
        self._over = False
        self._terminal = os.dup(2)
        line.listen(self._hear, self._end_alone, math.inf if is_here else SILENCE_SECONDS)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        if "SLURM_JOB_ID" not in os.environ:  # SLURM sends its signals to all ranks, twice
            threading.Thread(target=self._pass_signals, args=(reading,), name="signals", daemon=True).start()

    def fail(self, error: BaseException) -> None:
        """Report this rank's error to rank 0."""
        if isinstance(error, PeerLost):  # rank 0 determines the lost rank, and then ends this one
            time.sleep(_CAUSE_SECONDS)
        self._line.send({"kind": "failed", "text": f"{type(error).__name__}: {error}"[:8_000]})
        self._over = True

    def _hear(self, message: Message) -> None:
        kind = message.get("kind")
        self._over = self._over or kind in ("end", "abort")
        if kind == "abort":
            os._exit(1)
        if kind in ("call", "end"):
            self._calls.put(kind == "call")

    def _end_alone(self, silence: str) -> None:
        if self._over:
            return
        if self._says:
            text = f"error: rank 0 on {self._host} {silence or 'has ended'}, which ends this run. "
            with suppress(OSError):
                os.write(self._terminal, f"{text}The same command continues from the last saved state.\n".encode())
        os._exit(1)

    def _pass_signals(self, reading: int) -> None:
        """Forward the first signal to rank 0, which saves; exit at the second one, even inside MLX."""
        self._line.send({"kind": "stop", "signal": os.read(reading, 1)[0]})
        os._exit(128 + os.read(reading, 1)[0])


def find_facts(rank: int) -> Facts:
    """Return rank, host, process, versions, digest of the code and backend (cpu, metal or cuda) of this process."""
    from importlib.metadata import version

    from mlxchat.ops.device import describe_device

    return {
        "rank": rank, "host": platform.node(), "pid": os.getpid(), "mlxchat": __version__, "code": code_digest(),
        "mlx": version("mlx"), "backend": describe_device()["backend"],
    }  # fmt: skip


def describe_rank(facts: Facts) -> str:
    """Return, for example, 'rank 1 (process 4711 on mini2)'."""
    return f"rank {facts['rank']} (process {facts['pid']} on {facts['host']})"


@cache
def code_digest() -> str:
    """Return a digest of mlxchat's own Python files."""
    folder = Path(sys.modules["mlxchat"].__path__[0])
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def how_ended(code: int | None) -> str:
    """Return how a process ended, by its exit code (negative: a signal; None: unknown)."""
    if code is None:
        return "ended, or its connection was cut"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    memory = ", which the system also sends when memory runs out" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}{memory})"
