"""JSON lines that a kill may cut anywhere, and the list of a step's executions."""

import os
from pathlib import Path

from mlxchat.store import attempts
from mlxchat.store.files import Records

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
    attempts.start(tmp_path, "run1", "sft")
    assert attempts.read(tmp_path)[0]["outcome"] == "running"
    attempts._began.clear()  # as in another process
    second = attempts.start(tmp_path, "run2", "sft")
    attempts.finish(tmp_path, second, "done", None, 7)
    killed, done = attempts.read(tmp_path)
    assert (killed["outcome"], killed["ended"], killed["seconds"], killed["run"]) == ("killed", None, None, "run1")
    assert (done["outcome"], done["resumed_from"], done["run"], done["attempt"]) == ("done", 7, "run2", 2)
    assert (done["step"], done["pid"], done["host"]) == ("sft", os.getpid(), os.uname().nodename)


def test_killed_execution_is_explained_once_with_what_helps(tmp_path):
    assert attempts.explain_killed(tmp_path) is None
    number = attempts.start(tmp_path, "run1", "one")
    attempts._began.clear()  # as in another process
    assert "out-of-memory killer" in attempts.explain_killed(tmp_path, on_mac=False)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "derived.json").write_text('{"micro_batch_tokens": 8192}')
    for on_mac in (True, False):
        assert "machine.device_batch_tokens=4096" in attempts.explain_killed(tmp_path, on_mac=on_mac)
    assert "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in attempts.explain_killed(tmp_path, on_mac=True)
    attempts.finish(tmp_path, number, "interrupted", None, None)
    assert attempts.explain_killed(tmp_path) is None
