"""The end of a wait, and the holder's last iteration."""

import os
import signal

import pytest

from kit.toys import ONE
from mlxchat.errors import Interrupted
from mlxchat.store import locks
from mlxchat.store.attempts import iteration


def test_stop_ends_the_wait(toys):
    (step,) = toys.plan(ONE)
    toys.store.prepare()
    with locks.hold(toys.store.lock(step.key), {"run": "run7"}):

        def say(line: str) -> None:
            toys.said.append(line)
            if "waits" in line:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted, match=r"stopped while one waited\. The same command continues") as caught:
            toys.run(toys.plan(ONE), say=say)
    assert caught.value.exit_code == 143
    assert toys.said[0] == f"one        waits: process {os.getpid()} on {locks.host_name()} (run run7) is making it"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", None), (b'{"iteration": 3}\n{"iter', 3), (b'{"loss": 1}\n', None), (b"\xff\n[]\n", None)],
)
def test_last_iteration_is_read_from_partial_records(content, expected, tmp_path):
    (tmp_path / "ckpt" / "records").mkdir(parents=True)
    (tmp_path / "ckpt" / "records" / "metrics.jsonl").write_bytes(content)
    assert iteration(tmp_path) == expected
    assert iteration(tmp_path / "nothing") is None
