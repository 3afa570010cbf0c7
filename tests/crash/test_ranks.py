"""A rank that is killed, stopped or cannot start: all end within seconds, and the next run resumes."""

import json
import os
import re
import signal
import time
from typing import Any

import pytest

from kit.commands import is_alive, wait_until
from mlxchat.cli import dispatch
from mlxchat.store import attempts
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store

RANKS = ("ranks=2", "train.iterations=12")
THREE = ("ranks=3", "train.iterations=12")
SECONDS = 12.0


def wait_for(stubs: Any, iteration: int) -> list[int]:
    """Return the processes of the latest run's ranks once its step has done some iterations."""
    wait_until(lambda: any((attempts.iteration(work) or 0) >= iteration for work in stubs.outputs.glob("work/*")))
    latest = max(stubs.outputs.glob("runs/*/ranks.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(latest.read_text())["pids"]


def check_gone(pids: list[int]) -> None:
    """Check that all of these processes end without a signal of ours."""
    wait_until(lambda: not any(map(is_alive, pids)), seconds=3)


@pytest.fixture(scope="module")
def undisturbed(make_stubs: Any) -> Any:
    """A run of three ranks that nothing happened to."""
    stubs = make_stubs()
    code, text = stubs.run(*THREE)
    assert code == 0, text
    assert "[ring]" not in text
    return stubs


@pytest.mark.parametrize(
    ("name", "rank", "code", "message"),
    [
        ("KILL", 2, 1, "rank 2 (process {pid} on {host}) was killed by signal 9 (SIGKILL, which the system also sends"),
        pytest.param("INT", 0, 130, "together stopped at iteration", marks=pytest.mark.slow),
        pytest.param("STOP", 1, 1, "rank 1 (process {pid} on {host}) has sent nothing for 4", marks=pytest.mark.slow),
        pytest.param("TERM", 1, 143, "together stopped at iteration", marks=pytest.mark.slow),
        pytest.param("KILL", 0, -9, "", marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value)[:6],
)
def test_lost_rank_ends_the_run_which_then_resumes(stubs, undisturbed, name, rank, code, message):
    silence = {"mlxchat_silence_seconds": "4"} if name == "STOP" else {}  # a busy machine may be silent for a while
    process = stubs.start(*(THREE if name == "KILL" else RANKS), "train.pause=0.1", **silence)
    pids = wait_for(stubs, 3)
    assert pids[0] == process.pid
    began = time.monotonic()
    os.kill(pids[rank], getattr(signal, f"SIG{name}"))
    text, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < SECONDS
    assert process.returncode == code, text
    check_gone(pids)
    assert "[ring]" not in text
    assert "Traceback" not in text
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == (1 if message else 0), text
    if message:
        assert message.format(pid=pids[rank], host=os.uname().nodename) in errors[0]
        assert "The same command continues from" in errors[0]
    again, text = stubs.run(*RANKS)
    assert again == 0, text
    stubs.check_clean()
    assert stubs.trees() == undisturbed.trees()
    assert stubs.executions()["together"] == 2


def test_failing_rank_is_named_and_its_traceback_kept(stubs):
    code, text = stubs.run(*RANKS, "train.dtype=none")
    assert code == 1
    found = re.search(r"error: rank (1) \(process \d+ on .*\) failed: KeyError: 'none'\. All ranks have ended", text)
    assert found, text
    assert "Traceback" not in text
    (run,) = (stubs.outputs / "runs").iterdir()
    assert "KeyError: 'none'" in (run / f"rank-{found[1]}.log").read_text()


@pytest.mark.slow
def test_status_shows_ranks_until_a_second_signal_ends_all_at_once(stubs, capsys):
    process = stubs.start(*RANKS, "train.pause=60")
    pids = wait_for(stubs, 1)
    assert dispatch(["status", f"outputs={stubs.outputs}"]) == 0
    host = os.uname().nodename
    assert f"running in process {process.pid} on {host} with 2 ranks (ring) (run " in capsys.readouterr().out
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    check_gone(pids)
    assert time.monotonic() - began < SECONDS
    assert dispatch(["status", f"outputs={stubs.outputs}"]) == 0
    assert "ranks" not in capsys.readouterr().out


def test_rank_that_cannot_start_is_named_with_its_output(stubs, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no memory for this >&2\nexit 7\n")
    python.chmod(0o755)
    code, text = stubs.run("ranks=2", "targets=[source]", f"python={python}")
    assert code == 0, text
    assert not list(stubs.outputs.glob("runs/*/rank*")), "ranks start with the first step that needs them"
    code, text = stubs.run(*RANKS, f"python={python}")
    assert code == 1
    assert "could not be started: it ended with exit code 7" in text
    assert "no memory for this" in text


def test_ranks_have_logs_and_are_in_the_manifest(undisturbed):
    (run,) = (undisturbed.outputs / "runs").iterdir()
    assert sorted(path.name for path in run.glob("rank*")) == ["rank-0.log", "rank-1.log", "rank-2.log", "ranks.json"]
    assert "rank 2 of 3" in (run / "rank-2.log").read_text()
    refs = refs_of(Store(undisturbed.outputs))
    found = read_manifest(refs["together"])["excluded"]["ranks"]
    assert found == {"size": 3, "backend": "ring", "hosts": [os.uname().nodename] * 3}
    assert "ranks" not in read_manifest(refs["score"])["excluded"]
