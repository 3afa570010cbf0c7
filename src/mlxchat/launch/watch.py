"""Rank 0's view of the other ranks: who is there, who has gone, how, and the end of everything when one has."""

from __future__ import annotations

import hmac
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlxchat.errors import ConfigError, StepFailed
from mlxchat.launch.facts import Facts, describe_rank, find_differences
from mlxchat.launch.line import BEAT_SECONDS, SILENCE_SECONDS, Line, Message

_HELLO_SECONDS = 10.0
_CODE_SECONDS = 2.0
# How long a process may wait for others, one of which is lost, before it is ended.
_NOTICE_SECONDS = 20.0
_LOOK_SECONDS = 0.1
_CAUSE_SECONDS = 3.0
_MOST_LINES = 10_000


class Watch:
    """The lines to all other ranks. `Team` sends its orders here."""

    def __init__(self, facts: Facts, size: int, token: str = "") -> None:
        """Begin with nobody.

        Args:
            facts: of this process.
            size: ranks, this one included.
            token: what a rank must know to be one.
        """
        self.size, self._token = size, token
        self.facts: dict[int, Facts] = {0: facts}
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        """Ranks that this process started."""
        self.on_stop: Callable[[], None] = lambda: None
        """Called when another rank was asked to stop."""
        self.on_output: Callable[[int, str], None] = lambda rank, text: None
        """Called with what a rank has printed."""
        self.on_loss: Callable[[], None] = lambda: None
        """Called once when a rank is lost."""
        self.is_calling: Callable[[], bool] = lambda: True
        """Tells whether this process is at work with the others now, and not at something of its own."""
        self.loss: str | None = None
        """Which rank was lost first, and how."""
        self._lines: dict[int, Line] = {}
        self._lost, self._noticed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._told: dict[int, str | None] = {}
        """Rank → what it said of its failure; None: that it lost another one."""
        self._over = False

    def gather(self, listener: socket.socket, seconds: float, check: Callable[[], None], where: list[str]) -> None:
        """Wait until every other rank has come and is like this one, and let them go on.

        Args:
            listener: where they come to.
            seconds: to wait at most.
            check: called again and again; it may raise, to wait no longer.
            where: the hosts of all ranks, as far as known, to say who is missing.

        Raises:
            ConfigError: a rank runs other versions, other code or on another kind of backend.
            StepFailed: one did not come.
        """
        until = time.monotonic() + seconds
        listener.settimeout(0.1)
        while len(self._lines) < self.size - 1:
            check()
            if time.monotonic() > until:
                missing = [rank for rank in range(1, self.size) if rank not in self._lines]
                names = ", ".join(f"rank {rank}" + (f" ({where[rank]})" if where else "") for rank in missing)
                self._refuse("another rank did not come")
                raise StepFailed(
                    f"{names} did not come within {seconds:g} seconds. Was the same command started there?"
                )
            with suppress(TimeoutError):
                line = Line(listener.accept()[0])
                # One who says nothing keeps nobody waiting.
                threading.Thread(target=self._take, args=(line,), name="hello", daemon=True).start()
        wrong = []
        for rank in sorted(self._lines):
            differences = find_differences(self.facts[0], self.facts[rank])
            if differences:
                wrong.append(f"{describe_rank(self.facts[rank])} cannot work with rank 0 on {self.facts[0]['host']}:")
                wrong += [f"  {line}" for line in differences]
        if wrong:
            self._refuse("versions differ")
            raise ConfigError(
                "\n".join([*wrong, "All ranks need the same mlxchat, the same MLX and the same backend."])
            )

    def welcome(self, message: Message) -> None:
        """Tell all ranks how to join the group."""
        for line in self._lines.values():
            line.send({"kind": "welcome", **message})

    def begin(self) -> None:
        """Listen to all ranks from now on, and notice who is lost."""
        for rank, line in self._lines.items():
            line.heard = time.monotonic()
            line.listen(lambda message, rank=rank: self._hear(rank, message), lambda rank=rank: self._miss(rank))  # type: ignore[misc]
        threading.Thread(target=self._beat, name="ranks", daemon=True).start()

    def send(self, order: dict[str, Any]) -> None:
        """Tell all ranks what to do next."""
        for line in self._lines.values():
            line.send({"kind": "order", "order": order})

    def receive(self) -> dict[str, Any]:
        """Nobody gives rank 0 orders."""
        raise AssertionError

    def cause(self) -> str | None:
        """Return which rank was lost and how, waiting an instant for the news; nothing more happens by itself then."""
        self._lost.wait(_CAUSE_SECONDS)
        self._noticed.set()
        return self.loss

    def finish(self) -> None:
        """Take the end of the others for what it is from now on."""
        self._over = True

    def leave(self) -> None:
        """Be done with the others: who was told to end does so by itself, and what this process started is gone."""
        with self._lock:
            self._over = True
            lines = list(self._lines.values())
        for line in lines:
            line.close()
        self._kill_children()

    def kill(self) -> None:
        """Kill all other ranks of this machine, whoever started them: one that is stopped obeys nothing else."""
        self._over = True
        for rank, facts in self.facts.items():
            pid = facts["pid"]
            if rank in self.children or facts.get("place") != self.facts[0]["place"] or pid == os.getpid():
                continue
            if isinstance(pid, int) and pid > 1:  # others mean many processes
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        self.leave()

    def _kill_children(self) -> None:
        for child in self.children.values():
            if child.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        for child in self.children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(_CODE_SECONDS)

    def _take(self, line: Line) -> None:
        """Believe a stranger who knows the token and says which rank it is."""
        message = line.receive_within(_HELLO_SECONDS) or {}
        knows = hmac.compare_digest(str(message.get("token", "")).encode(), self._token.encode())
        facts = message.get("facts")
        rank = facts.get("rank") if isinstance(facts, dict) else None
        if not knows or message.get("kind") != "hello" or not isinstance(rank, int) or not 0 < rank < self.size:
            line.close()
            return
        with self._lock:
            is_new = rank not in self._lines and not self._over
            if is_new:
                self.facts[rank] = {"host": "?", "pid": "?", **facts}  # type: ignore[dict-item]
                self._lines[rank] = line
        if not is_new:
            line.send({"kind": "refused"})
            line.close()

    def _refuse(self, why: str) -> None:
        for line in self._lines.values():
            line.send({"kind": "refused", "why": why})
        self.leave()

    def _hear(self, rank: int, message: Message) -> None:
        kind = message.get("kind")
        if kind == "output":
            self.on_output(rank, str(message.get("text")))
        elif kind == "stop":
            self.on_stop()
        elif kind == "failed":
            self._told[rank] = None if message.get("peer") else str(message.get("text"))

    def _miss(self, rank: int) -> None:
        """Find out how a rank ended whose line is closed."""
        if self._over:
            return
        if rank in self._told:
            text = self._told[rank]
            if text is None:  # another one is the cause, and will be noticed too
                self._lost.wait(_CAUSE_SECONDS)
            self._lose(rank, f"failed: {text}" if text is not None else "lost its connection to another rank")
            return
        child = self.children.get(rank)
        code = None
        if child is not None:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(_CODE_SECONDS)
        self._lose(rank, how_ended(code))

    def _beat(self) -> None:
        """Say and hear that somebody is there, once a second."""
        last = time.monotonic()
        while not self._over and self.loss is None:
            time.sleep(BEAT_SECONDS)
            now = time.monotonic()
            asleep, last = now - last > 3 * BEAT_SECONDS, now
            for rank, line in list(self._lines.items()):
                if asleep:  # this process was stopped or had no core: the others' beats wait to be read
                    line.heard = now
                line.send_at_once({"kind": "beat"})
                if now - line.heard > SILENCE_SECONDS and not self._over:
                    what = "it hangs, was stopped, or its network is gone"
                    self._lose(rank, f"has said nothing for {SILENCE_SECONDS:g} seconds: {what}")
                    break

    def _lose(self, rank: int, how: str) -> None:
        with self._lock:
            if self._over or self.loss is not None:
                return
            self.loss = f"{describe_rank(self.facts[rank])} {how}"
        self._lost.set()
        for line in self._lines.values():
            line.send_at_once({"kind": "abort"})
        self._lines[rank].cut()  # an order may be waiting for it to read
        self.on_loss()
        waited = 0.0
        # What this process does by itself, a save say, is not lost: it notices when it needs the others again.
        while waited < _NOTICE_SECONDS and not self._noticed.wait(_LOOK_SECONDS):
            waited += _LOOK_SECONDS if self.is_calling() else 0.0
        if not self._noticed.is_set():
            text = f"error: {self.loss}.\n       The same command continues from what was saved last."
            with suppress(OSError, ValueError):
                print(text, file=sys.stderr, flush=True)
            self.kill()
            os._exit(1)


def how_ended(code: int | None) -> str:
    """Return how a process ended, of which this is the exit code (negative: a signal; None: it is elsewhere)."""
    if code is None:
        return "ended, or the connection to it was cut"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    memory = ", which the system also sends when memory runs out" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}{memory})"
