"""The lines between rank 0 and the others when one side does not read, is a stranger, or ends in the middle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import StepFailed
from mlxchat.launch import follow, meeting, ranks, watch
from mlxchat.launch import line as line_module
from mlxchat.launch.facts import find_facts
from mlxchat.launch.line import Line, connect, listen_at
from mlxchat.launch.watch import Watch

LONG = {"text": "x" * (15 * 2**20)}  # more than a connection holds


@pytest.fixture
def two_ends() -> Any:
    """Two ends of a connection, the second of which nobody reads."""
    with listen_at("127.0.0.1", 0) as listener:
        other = socket.create_connection(listener.getsockname()[:2])
        line = Line(listener.accept()[0])
    yield line, other
    line.close()
    other.close()


def test_a_short_message_is_left_while_a_long_one_waits_for_a_rank_that_does_not_read(two_ends: Any) -> None:
    line, _ = two_ends
    sender = threading.Thread(target=line.send, args=(LONG,), daemon=True)
    sender.start()
    time.sleep(0.2)
    assert sender.is_alive()
    began = time.monotonic()
    line.send_at_once({"kind": "beat"})
    assert time.monotonic() - began < 2
    line.cut()
    sender.join(5)
    assert not sender.is_alive()


def test_a_short_message_arrives_where_somebody_reads(two_ends: Any) -> None:
    line, other = two_ends
    line.send_at_once({"kind": "beat"})
    assert other.makefile("rb").readline() == b'{"kind": "beat"}\n'


def test_a_short_message_to_a_line_that_is_closed_is_left(two_ends: Any) -> None:
    line, other = two_ends
    line.close()
    line.send_at_once({"kind": "beat"})
    assert other.makefile("rb").read() == b"", "nothing arrives, and nothing is raised"


def test_a_message_that_the_other_side_would_not_read_is_refused(
    two_ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "_MOST_BYTES", 100)
    with pytest.raises(ValueError, match="a message to another rank has 102 bytes, more than 100"):
        two_ends[0].send({"text": "x" * 89})
    assert two_ends[0].send({"text": "x" * 87})


def gather(seen: Watch, facts: dict[str, Any], token: str, seconds: float = 5) -> Line:
    """Have one rank come to a watch; return its end of the line."""
    with listen_at("127.0.0.1", 0) as listener:
        other = connect(listener.getsockname()[:2], 5)
        other.send({"kind": "hello", "facts": facts, "token": token})
        try:
            seen.gather(listener, seconds, lambda: None, [])
        except StepFailed:
            other.close()
            raise
    return other


def test_a_rank_that_hangs_is_noticed_while_an_order_waits_for_it_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.1)
    seen = Watch(find_facts(0), 2)
    other = gather(seen, find_facts(1), "")
    try:
        seen.begin()
        sender = threading.Thread(target=seen.send, args=(LONG,), daemon=True)
        sender.start()
        assert "has said nothing for 1 seconds" in str(seen.cause())
        sender.join(5)
        assert not sender.is_alive()
    finally:
        seen.leave()
        other.close()


def test_a_stranger_who_says_nothing_keeps_nobody_waiting() -> None:
    seen = Watch(find_facts(0), 2)
    with listen_at("127.0.0.1", 0) as listener:
        silent = socket.create_connection(listener.getsockname()[:2])
        other = connect(listener.getsockname()[:2], 5)
        other.send({"kind": "hello", "facts": find_facts(1)})
        began = time.monotonic()
        seen.gather(listener, 5, lambda: None, [])
    assert time.monotonic() - began < 4
    seen.leave()
    other.close()
    silent.close()


def test_a_rank_does_not_wait_for_ever_for_a_rank_0_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "WELCOME_SECONDS", 0.3)
    with listen_at("127.0.0.1", 0) as listener:
        address = listener.getsockname()[:2]
        assert follow.follow(meeting.Meeting(rank=1, size=2, backend="ring", address=address)) == 1


def test_a_stranger_without_the_word_of_the_run_is_no_rank() -> None:
    seen = Watch(find_facts(0), 2, "right")
    with pytest.raises(StepFailed, match="rank 1 did not come"):
        gather(seen, find_facts(1), "wrong", seconds=0.5)
    seen = Watch(find_facts(0), 2, "right")
    gather(seen, find_facts(1), "right").close()
    seen.leave()


@pytest.mark.parametrize("pid", [-1, 0, 1, "12", None, "own"])
def test_nothing_else_is_killed_whatever_a_rank_says_is_its_number(pid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda number, signal: killed.append(number))
    seen = Watch(find_facts(0), 2)
    other = gather(seen, find_facts(1) | {"pid": os.getpid() if pid == "own" else pid}, "")
    seen.kill()
    other.close()
    assert killed == []


def test_a_rank_of_this_machine_is_killed_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda number, signal: killed.append(number))
    seen = Watch(find_facts(0), 2)
    other = gather(seen, find_facts(1) | {"pid": 2**22 + 1}, "")
    seen.kill()
    other.close()
    assert killed == [2**22 + 1]


def test_a_process_that_a_rank_starts_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv(meeting.TOKEN, "word")
    monkeypatch.delenv("MLX_RANK", raising=False)
    assert meeting.find_meeting() is not None
    assert meeting.take_token() == "word"
    meeting.forget_meeting()
    assert meeting.find_meeting() is None
    assert meeting.take_token() == ""


@pytest.mark.parametrize(
    ("device", "backend", "gpus", "expected"),
    [("cpu", "cuda", 1, "ring"), ("auto", "cuda", 2, "nccl"), ("auto", "metal", 1, "ring"), ("auto", "cpu", 0, "ring")],
)
def test_ranks_of_this_machine_meet_by_what_they_compute_on(
    device: str, backend: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mlx.core as mx

    monkeypatch.setattr("mlxchat.ops.device.backend", lambda: backend)
    monkeypatch.setattr(mx.distributed, "is_available", lambda name: True)
    monkeypatch.setattr(mx, "device_count", lambda device: gpus)

    def start(order: dict[str, Any], *rest: Any) -> Any:
        raise RuntimeError(order["backend"])

    monkeypatch.setattr(ranks, "_start", start)
    with pytest.raises(RuntimeError, match=expected):
        ranks.start_here(2, tmp_path, 1, device, print, lambda: None)


JOINS = """
import mlxchat, time
from mlxchat.launch.joining import _ending_after
with _ending_after(2, tell=True):
    print("joining", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("ends", [True, False])
def test_who_watches_a_joining_ends_with_it_and_else_ends_it(ends: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", JOINS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if ends:
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == -signal.SIGINT
        rest = process.stdout.read()  # until the watcher is gone too
    assert ("MLX did not connect them within 2 seconds" in rest) is not ends
    assert process.returncode == (-signal.SIGINT if ends else -signal.SIGKILL)


HANGS = """
import mlxchat, time
from mlxchat.launch import watch
from mlxchat.launch.facts import find_facts
from mlxchat.launch.line import connect, listen_at
watch._NOTICE_SECONDS = 0.3
seen = watch.Watch(find_facts(0), 2)
with listen_at("127.0.0.1", 0) as listener:
    other = connect(listener.getsockname()[:2], 5)
    other.send({"kind": "hello", "facts": find_facts(1) | {"host": "mini2", "pid": 4711, "place": "elsewhere"}})
    seen.gather(listener, 5, lambda: None, [])
seen.begin()
other.close()
time.sleep(30)
"""


def test_work_of_its_own_is_brought_to_its_end_although_a_rank_is_lost() -> None:
    own = HANGS.replace("seen.begin()", "seen.is_calling = lambda: False; seen.begin()").replace("(30)", "(2)")
    done = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_does_not_notice_that_a_rank_is_lost_says_so_and_ends() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "error: rank 1 (process 4711 on mini2) ended, or the connection to it was cut." in done.stderr
    assert "The same command continues from what was saved last." in done.stderr
