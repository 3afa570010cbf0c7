"""A rank that follows: it computes what rank 0 asks for and nothing else, and ends with it."""

from __future__ import annotations

import mlxchat  # isort: split

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

from mlxchat.launch.facts import find_facts
from mlxchat.launch.line import BEAT_SECONDS, SILENCE_SECONDS, Line, Message, connect
from mlxchat.launch.meeting import Meeting, take_token

assert mlxchat

CONNECT_SECONDS = 120.0
# Rank 0 waits for the others for less.
WELCOME_SECONDS = 180.0
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux
# A Ctrl-C on a terminal reaches all ranks there: rank 0 shall notice its own first.
_FIRST_SECONDS = 0.3
_MOST_LETTERS = 100_000  # of a line that was printed


class Follower:
    """This process as a rank of a run that another process leads."""

    def __init__(self, line: Line, host: str, *, says: bool) -> None:
        """Take the line to rank 0 and the host it is on; `says`: whether this rank tells people if rank 0 is gone."""
        self.line, self.host, self.says = line, host, says
        self.orders: queue.Queue[dict[str, Any]] = queue.Queue()
        self.is_over = False
        self.terminal = os.dup(2)

    def send(self, order: dict[str, Any]) -> None:
        """Followers give no orders."""
        raise AssertionError

    def receive(self) -> dict[str, Any]:
        """Return what rank 0 said next."""
        return self.orders.get()

    def begin(self, *, same_host: bool) -> None:
        """Listen to rank 0 from now on, and end with it."""
        self.line.listen(self._hear, self._miss)
        threading.Thread(target=self._beat, args=(same_host,), name="beats", daemon=True).start()

    def _hear(self, message: Message) -> None:
        if message.get("kind") == "order":
            order = message["order"]
            self.is_over = self.is_over or order["function"] == ""
            self.orders.put(order)
        elif message.get("kind") == "abort":
            self.is_over = True
            os._exit(1)

    def _miss(self) -> None:
        if not self.is_over:
            self._end_alone(f"rank 0 on {self.host} has gone")

    def _beat(self, same_host: bool) -> None:
        last = time.monotonic()
        while not self.is_over:
            time.sleep(BEAT_SECONDS)
            now = time.monotonic()
            asleep, last = now - last > 3 * BEAT_SECONDS, now
            if asleep:
                self.line.heard = now
            self.line.send_at_once({"kind": "beat"})
            # On one machine the kernel tells of its end, and whoever only stopped it for a while may go on.
            if not same_host and now - self.line.heard > SILENCE_SECONDS:
                self._end_alone(f"rank 0 on {self.host} has said nothing for {SILENCE_SECONDS:g} seconds")

    def _end_alone(self, what: str) -> None:
        if self.says:
            text = f"error: {what}: this run is over. The same command continues from what was saved last.\n"
            with suppress(OSError):
                os.write(self.terminal, text.encode())
        os._exit(1)


def follow(meeting: Meeting, *, started_by_lead: bool = False, says: bool = False) -> int:
    """Be a rank until rank 0 ends it; return the exit code.

    Args:
        meeting: which rank this process is, and where rank 0 listens.
        started_by_lead: whether rank 0 started this process, which then writes to a file already.
        says: whether this rank tells people if rank 0 is gone.
    """
    from mlxchat.launch.joining import join_group

    facts = find_facts(meeting.rank)
    group, address = None, meeting.address
    if address is None:
        group, _ = join_group(meeting.backend, {}, None, tell=False)
        address = tuple(group.share_json())
    host, port = address
    try:
        line = connect((host, port), CONNECT_SECONDS)
    except OSError as error:
        print(f"error: rank {meeting.rank} on {facts['host']} finds no rank 0 at {host}:{port} ({error})",
              file=sys.stderr)  # fmt: skip
        return 1
    line.send({"kind": "hello", "facts": facts, "token": take_token()})
    answer = line.receive_within(WELCOME_SECONDS)
    if answer is None or answer.get("kind") != "welcome":
        line.close()
        return 1  # rank 0 has said why
    variables = {"MLX_RANK": str(meeting.rank), **answer["variables"]}
    if group is None:
        group, _ = join_group(meeting.backend, variables, answer["hosts"], tell=False)
    follower = Follower(line, answer["host"], says=says)
    return work(follower, group, same_host=answer["host"] == facts["host"], forward=not started_by_lead)


def work(follower: Follower, group: Any, *, same_host: bool, forward: bool) -> int:
    """Do what rank 0 asks for; return the exit code."""
    from mlxchat.distributed.group import PeerLost
    from mlxchat.distributed.team import Team

    if forward:
        _forward_output(follower.line)
    follower.begin(same_host=same_host)
    _handle_signals(follower)
    try:
        Team(group, follower).follow()
    except BaseException as error:
        if not isinstance(error, PeerLost):
            traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        follower.line.send({"kind": "failed", "text": text, "peer": isinstance(error, PeerLost)})
        sys.stderr.flush()
        time.sleep(0.2)  # for what was printed to arrive
        follower.is_over = True
        return 1
    sys.stdout.flush()
    sys.stderr.flush()
    return 0


def _handle_signals(follower: Follower) -> None:
    """Pass the wish to stop on to rank 0, which saves; at the second signal leave at once."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)

    def watch() -> None:
        told = False
        while numbers := os.read(reading, 1):
            if numbers[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if told:
                os._exit(128 + numbers[0])
            told = True
            time.sleep(_FIRST_SECONDS)
            follower.line.send({"kind": "stop"})

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _forward_output(line: Line) -> None:
    """Send what is printed here to rank 0, which keeps it, instead of to the terminal."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)

    def work() -> None:
        with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
            for text in lines:
                line.send({"kind": "output", "text": text.rstrip("\n")[:_MOST_LETTERS]})

    threading.Thread(target=work, name="output", daemon=True).start()


def _end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone (Linux), even if it is stopped."""
    parent = os.getppid()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def main(order: dict[str, Any]) -> int:
    """Follow as a process that rank 0 started with this order."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order["address"] = tuple(order["address"])
    return follow(Meeting(**order), started_by_lead=True)


if __name__ == "__main__":
    os._exit(main(json.loads(sys.argv[1])))
