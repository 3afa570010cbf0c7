"""Connections between rank 0 and other ranks that do not read, have no token, or end."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.distributed import ranks, watch
from mlxchat.distributed.watch import Line, Watch, connect, find_facts, listen_at
from mlxchat.errors import PeerLost, StepFailed
from mlxchat.runner.process import stop_on_signals


@pytest.fixture
def terminated() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def two_ends() -> Any:
    """Both ends of a connection; nobody reads the second."""
    with listen_at("127.0.0.1", 0) as listener:
        other = socket.create_connection(listener.getsockname()[:2])
        line = Line(listener.accept()[0])
    yield line, other
    line.close()
    other.close()


def test_a_rank_that_does_not_read_delays_no_sender(two_ends):
    line, _ = two_ends
    sender = threading.Thread(target=lambda: [line.send({"text": "x" * 10_000}) for _ in range(2000)], daemon=True)
    sender.start()
    sender.join(5)
    assert not sender.is_alive()


def gather(seen: Watch, facts: dict[str, Any], token: str, seconds: float = 5) -> Line:
    """Connect one rank to a watch; return its end of the line."""
    with listen_at("127.0.0.1", 0) as listener:
        other = connect(listener.getsockname()[:2], 5)
        other.send({"kind": "hello", "facts": facts, "token": token})
        try:
            seen.gather(listener, seconds, lambda: None, [])
        except StepFailed:
            other.close()
            raise
    return other


@pytest.mark.usefixtures("terminated")
def test_a_hanging_rank_is_reported_and_calls_raise(monkeypatch):
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.1)
    seen = Watch(find_facts(0), 2)
    other = gather(seen, find_facts(1), "")
    try:
        seen.begin()
        seen.wake()
        assert "has sent nothing for 1 seconds" in seen.explain()
        with pytest.raises(PeerLost, match="has sent nothing"):
            seen.wake()
    finally:
        seen.leave()
        other.close()


@pytest.mark.usefixtures("terminated")
def test_a_launchers_sigterm_does_not_hide_the_lost_rank(tmp_path):
    """mlx.launch sends SIGTERM to all ranks when one has ended."""
    seen = Watch(find_facts(0), 2)
    seen.work, seen.loss = tmp_path, "rank 1 was killed"
    seen._lost.set()
    (tmp_path / "00000012").mkdir()
    with stop_on_signals(lambda number: None, lambda: None):
        text = seen.explain()
    assert text == "rank 1 was killed. All ranks have ended. The same command continues from iteration 12."
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_silent_connection_delays_no_rank():
    seen = Watch(find_facts(0), 2)
    with listen_at("127.0.0.1", 0) as listener:
        silent = socket.create_connection(listener.getsockname()[:2])
        other = connect(listener.getsockname()[:2], 5)
        other.send({"kind": "hello", "facts": find_facts(1)})
        seen.gather(listener, 5, lambda: None, [])  # raises after 5 s
    seen.leave()
    other.close()
    silent.close()


def test_a_rank_gives_up_on_a_silent_rank_0(monkeypatch):
    monkeypatch.setattr(ranks, "_WELCOME_SECONDS", 0.3)
    with listen_at("127.0.0.1", 0) as listener:
        address = listener.getsockname()[:2]
        assert ranks.follow(ranks.Meeting(rank=1, size=2, backend="ring", address=address)) == 1


def test_a_connection_without_the_token_is_refused():
    seen = Watch(find_facts(0), 2, "right")
    with pytest.raises(StepFailed, match="rank 1 did not connect"):
        gather(seen, find_facts(1), "wrong", seconds=0.5)
    seen = Watch(find_facts(0), 2, "right")
    gather(seen, find_facts(1), "right").close()
    seen.leave()


def test_child_processes_are_not_ranks(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv(ranks.TOKEN, "word")
    monkeypatch.delenv("MLX_RANK", raising=False)
    assert ranks.find_meeting() is not None
    ranks.forget_meeting()
    assert ranks.find_meeting() is None
    assert ranks.TOKEN not in os.environ


@pytest.mark.parametrize(
    ("device", "nccl", "gpus", "expected"),
    [("cpu", True, 2, "ring"), ("auto", True, 2, "nccl"), ("auto", True, 0, "ring"), ("auto", False, 1, "ring")],
)
def test_the_backend_of_local_ranks_follows_the_device(device, nccl, gpus, expected, monkeypatch, tmp_path):
    import mlx.core as mx

    monkeypatch.setattr(mx.distributed, "is_available", lambda name: name != "nccl" or nccl)
    monkeypatch.setattr(mx, "device_count", lambda device: gpus)

    def spawn(rank: int, variables: dict[str, str], folder: Path, threads: int, kind: str) -> Any:
        raise RuntimeError(kind)

    monkeypatch.setattr(ranks, "_spawn", spawn)
    machine = replace(compose_config([]).config.machine, device=device, num_processes=2)
    with pytest.raises(RuntimeError, match=expected):
        ranks.Ranks(machine).start(SimpleNamespace(folder=tmp_path, say=print, stop_signal=None), "train")


JOINS = """
import mlxchat, time
from mlxchat.distributed.ranks import _ending_after
with _ending_after(2, "MLX did not connect them"):
    print("joining", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("ends", [True, False])
def test_joining_ends_with_a_message_after_the_limit(ends):
    with subprocess.Popen(
        [sys.executable, "-c", JOINS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        process.stdout.readline()
        if ends:
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == -signal.SIGINT
        rest = process.stdout.read()  # until the shell has ended, too
    assert rest == ("" if ends else "MLX did not connect them")
    assert process.returncode == (-signal.SIGINT if ends else 1)


HANGS = """
import mlxchat, time
from mlxchat.distributed import watch
from mlxchat.distributed.watch import connect, find_facts, listen_at
watch._NOTICE_SECONDS = 0.3
seen = watch.Watch(find_facts(0), 2)
with listen_at("127.0.0.1", 0) as listener:
    other = connect(listener.getsockname()[:2], 5)
    other.send({"kind": "hello", "facts": find_facts(1) | {"host": "mini2", "pid": 4711}})
    seen.gather(listener, 5, lambda: None, [])
seen.begin()
other.close()
time.sleep(30)
"""


def test_work_between_calls_is_completed_after_a_loss():
    own = HANGS.replace("seen.begin()", "seen.is_calling = lambda: False; seen.begin()").replace("(30)", "(2)")
    done = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_blocked_process_is_ended_after_a_loss():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "error: rank 1 (process 4711 on mini2) ended, or its connection was cut." in done.stderr
    assert "The same command continues from the last saved state." in done.stderr


ERRORS = """
import mlxchat, os, sys
from pathlib import Path
from mlxchat.distributed.ranks import _divert_errors
_divert_errors(Path(sys.argv[1]))
os.write(2, b"[ring] Socket 4 was closed by the peer\\n")
print("a warning", file=sys.stderr)
"""


def test_only_pythons_errors_reach_the_terminal(tmp_path):
    log = tmp_path / "rank-0.log"
    done = subprocess.run([sys.executable, "-c", ERRORS, log], capture_output=True, text=True, timeout=20, check=True)
    assert done.stderr == "a warning\n"
    assert log.read_text() == "[ring] Socket 4 was closed by the peer\n"


BLOCKED = """
import mlxchat, ctypes, os, signal, threading
from mlxchat.distributed.watch import Follower, connect, listen_at
with listen_at("127.0.0.1", 0) as listener:
    follower = Follower(connect(listener.getsockname()[:2], 5), "mini1", is_here=True, says=True)
    rank_0 = listener.accept()[0].makefile("rb")
def send():
    os.kill(os.getpid(), signal.SIGTERM)
    while b"stop" not in (line := rank_0.readline()):
        pass
    print(line.decode(), end="", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=send, daemon=True).start()
mutex, lib = ctypes.create_string_buffer(256), ctypes.CDLL(None)
lib.pthread_mutex_init(mutex, None)
for _ in range(2):  # C code that no signal interrupts
    lib.pthread_mutex_lock(mutex)
"""


def test_a_blocked_rank_passes_its_signal_on_and_ends_at_the_second():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=20)
    assert done.stdout == '{"kind": "stop", "signal": 15}\n', done.stderr
    assert done.returncode == 128 + signal.SIGTERM
