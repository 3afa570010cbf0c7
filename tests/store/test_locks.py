"""Locks: one holder at a time, and none after its death. Attempts: one that has no recorded end was killed."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import StoreError
from mlxchat.store import locks
from mlxchat.store.files import Records
from mlxchat.store.locks import explain_killed, finish_attempt, read_attempts, start_attempt

HOLDER = """
import os, sys, time
from pathlib import Path
from mlxchat.store import locks
with locks.hold(Path(sys.argv[1]), {"step": "pretrain", "run": "run7"}):
    if "fork" not in sys.argv or not os.fork():
        print(os.getpid(), flush=True)  # a child has closed the inherited locks
    time.sleep(60)
"""


@pytest.fixture
def hold_elsewhere(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start a process that holds tmp_path/x.lock; return it and the id of its child."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], int]:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "x.lock"), *arguments], stdout=subprocess.PIPE, text=True
        )
        started.append(holder)
        return holder, int(holder.stdout.readline())

    yield start
    for holder in started:
        holder.kill()
        holder.communicate()


def test_waiter_sees_the_holder_and_gets_its_lock(tmp_path, hold_elsewhere):
    assert not locks.is_held(tmp_path / "x.lock")
    holder, _ = hold_elsewhere()
    assert locks.is_held(tmp_path / "x.lock")
    holders: list[dict[str, Any]] = []

    def kill_holder(owner: dict[str, Any]) -> None:
        holders.append(owner)
        holder.send_signal(signal.SIGKILL)

    with locks.hold(tmp_path / "x.lock", {"step": "mine"}, kill_holder) as waited:
        assert waited
        owner = locks.read_owner(tmp_path / "x.lock")
        assert owner == {"pid": os.getpid(), "host": os.uname().nodename, "step": "mine"}
    assert not locks.is_held(tmp_path / "x.lock")
    assert [(owner["pid"], owner["step"], owner["run"]) for owner in holders] == [(holder.pid, "pretrain", "run7")]


def test_surviving_child_does_not_keep_the_lock(tmp_path, hold_elsewhere):
    holder, child = hold_elsewhere("fork")
    try:
        assert locks.is_held(tmp_path / "x.lock")
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives
        assert not locks.is_held(tmp_path / "x.lock")
    finally:
        os.kill(child, signal.SIGKILL)


def test_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StoreError, match=r"cannot be locked .*outputs=PATH"), locks.hold(tmp_path / "x.lock", {}):
        pass


def test_waiter_for_a_removed_lock_file_takes_the_new_one(tmp_path, hold_elsewhere):
    hold_elsewhere()
    path = tmp_path / "x.lock"
    with locks.hold(path, {"step": "mine"}, lambda owner: path.unlink()):
        assert locks.is_held(path)
        assert locks.owns(path)
        path.unlink()
        assert not locks.owns(path)


@pytest.mark.parametrize(
    ("devices", "visible", "job", "expected"),
    [(0, None, None, ["0"]), (2, None, None, ["0", "1"]), (2, "1", None, ["1"]), (2, "0", "3", ["3"])],
    ids=["Mac", "CUDA", "one visible", "CUDA numbers the devices of the job"],
)
def test_each_visible_gpu_has_one_lock(devices, visible, job, expected, tmp_path, monkeypatch):
    for number in range(devices):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        (tmp_path / f"0000:0{number}:00.0" / "information").touch()
    monkeypatch.setattr(locks, "_NVIDIA", tmp_path)
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("SLURM_JOB_GPUS", job)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLXCHAT_LOCKS", str(tmp_path / "locks"))
    assert list(locks.gpu_locks()) == expected


TEXTS = ("é ☃", "\u2028\x85\r\n", '"\\')
WRITTEN = [{"iteration": index, "text": text, "loss": 0.1} for index, text in enumerate(TEXTS)]


def cut_files(tmp_path: Path) -> list[tuple[int, Records]]:
    """Return files of WRITTEN cut at every byte, each with its number of complete records."""
    whole = Records(tmp_path / "whole.jsonl")
    ends = [0]
    for record in WRITTEN:
        whole.append(record)
        ends.append(whole.path.stat().st_size)
    found = []
    for length in range(ends[-1] + 1):
        cut = Records(tmp_path / f"{length}.jsonl")
        cut.path.write_bytes(whole.path.read_bytes()[:length])
        found.append((sum(length >= end - 1 for end in ends[1:]), cut))
    return found


def test_cut_file_keeps_earlier_and_later_records(tmp_path):
    for num_whole, cut in cut_files(tmp_path):
        assert cut.read() == WRITTEN[:num_whole]
        cut.append({"iteration": 9})
        assert cut.read() == [*WRITTEN[:num_whole], {"iteration": 9}]


def test_execution_without_an_end_was_killed(tmp_path):
    start_attempt(tmp_path, "run1", "sft")
    assert read_attempts(tmp_path)[0]["outcome"] == "running"
    locks._began.clear()  # as in another process
    second = start_attempt(tmp_path, "run2", "sft")
    finish_attempt(tmp_path, second, "done", None, 7)
    killed, done = read_attempts(tmp_path)
    assert (killed["outcome"], killed["ended"], killed["seconds"], killed["run"]) == ("killed", None, None, "run1")
    assert (done["outcome"], done["resumed_from"], done["run"], done["attempt"]) == ("done", 7, "run2", 2)
    assert (done["step"], done["pid"], done["host"]) == ("sft", os.getpid(), os.uname().nodename)


def test_killed_execution_is_explained_once_with_what_helps(tmp_path):
    assert explain_killed(tmp_path) is None
    number = start_attempt(tmp_path, "run1", "one")
    locks._began.clear()  # as in another process
    assert "out-of-memory killer" in explain_killed(tmp_path, on_mac=False)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "derived.json").write_text('{"micro_batch_tokens": 8192}')
    for on_mac in (True, False):
        assert "machine.device_batch_tokens=4096" in explain_killed(tmp_path, on_mac=on_mac)
    assert "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in explain_killed(tmp_path, on_mac=True)
    finish_attempt(tmp_path, number, "interrupted", None, None)
    assert explain_killed(tmp_path) is None
