"""The three services run offline, and their files are read back."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxchat.config.schema import TrackerConfig
from mlxchat.trackers import Tracker
from mlxchat.trackers.services import Published, Results

TRACK = """
import sys
from pathlib import Path
from mlxchat.config.schema import TrackerConfig
from mlxchat.trackers import Tracker
from mlxchat.trackers.services import Published, Results
kind, run, begin, end, done = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "done"
run.mkdir(parents=True)
config = TrackerConfig(kind=kind, project="parity", tags=["offline"])
records = run.parent.parent / "records"
records.mkdir(exist_ok=True)
tracker = Tracker(config, run, ids=["a", "b"], settings={"seed": 42, "model": {"depth": 4}}, say=print,
                  records=lambda step: records / "metrics.jsonl")
(run / "report.md").write_text("# all went well")
(run / "report.html").write_text("<p>all went well</p>")
for i in range(begin, end):
    tracker.log("pretrain", {"iteration": i, "loss": 8.0 / i})
results = Results(numbers={"eval_sft": {"mean_centered": 0.25}}, report=run / "report.html",
                  artifacts={"pretrain": Published(id="a1b2", kind="checkpoint", folder=records)})
tracker.finish(results if done else Results(is_done=False))
"""


def track(kind: str, outputs: Path, environ: dict[str, str]) -> None:
    """Track iterations 1 to 3 in one process, which is interrupted, and 3 to 5 in a second one, which ends."""
    for run, begin, end, how in (("1-first", 1, 4, "interrupted"), ("2-second", 3, 6, "done")):
        done = subprocess.run(
            [sys.executable, "-c", TRACK, kind, str(outputs / "runs" / run), str(begin), str(end), how],
            capture_output=True, text=True, env=environ, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "warning: tracker" not in done.stdout, done.stdout


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO", "HF_"))}
    return kept | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}


def events_of(folder: Path) -> Iterator[Any]:
    """Read TensorBoard's records: length, checksum of it, a serialised Event, checksum."""
    from tensorboardX.proto import event_pb2

    for path in sorted(folder.glob("events.out.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event()
            event.ParseFromString(data[12 : 12 + length])
            yield event
            data = data[16 + length :]


def test_tensorboard_gets_curves_and_results(tmp_path):
    pytest.importorskip("tensorboardX")
    folder = tmp_path / "runs" / "1"
    folder.mkdir(parents=True)
    said: list[str] = []
    config = TrackerConfig(kind="tensorboard", project="p", tags=["t"])
    (folder / "report.md").write_text("# all went well")
    tracker = Tracker(config, folder, ids=["a"], say=said.append, records=lambda step: folder / "metrics.jsonl")
    for iteration in (1, 2):
        tracker.log("pretrain", {"iteration": iteration, "loss": 8.0 / iteration})
        tracker.log("sft", {"iteration": iteration, "loss": 1.0})
    results = Results(
        numbers={"eval_sft": {"mean_centered": 0.25}},
        artifacts={"sft": Published(id="a1b2", kind="checkpoint", folder=Path("/store/sft-a1b2"))},
        report=folder / "report.html",
    )  # fmt: skip
    tracker.finish(results)
    assert said == []
    values = [
        (event.step, value)
        for event in events_of(tmp_path / "tensorboard" / "1" / "pretrain")
        for value in event.summary.value
    ]
    found = [(step, value.tag, value.simple_value) for step, value in values if value.tag == "loss"]
    assert found == [(1, "loss", 8.0), (2, "loss", 4.0)]
    assert (tmp_path / "tensorboard" / "1" / "sft").is_dir()
    last = [v for event in events_of(tmp_path / "tensorboard" / "1" / "results") for v in event.summary.value]
    assert ("eval_sft/mean_centered", 0.25) in [(value.tag, value.simple_value) for value in last]
    texts = {
        value.tag.partition("/")[0]: value.tensor.string_val[0].decode() for value in last if value.tensor.string_val
    }
    assert texts["artifacts"] == "- sft: checkpoint /store/sft-a1b2"
    assert texts["report"] == "# all went well"


@pytest.mark.slow
def test_trackio_continues_its_run(tmp_path, environ):
    pytest.importorskip("trackio")
    track("trackio", tmp_path, environ)
    (database,) = (tmp_path / "trackio").glob("parity*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        configs = connection.execute("SELECT run_name, config FROM configs").fetchall()
        everything = "\n".join(connection.iterdump())
    assert {run for run, _, _ in rows} == {"1-first"}
    losses = [(step, json.loads(m)["pretrain/loss"]) for _, step, m in rows if "pretrain/loss" in json.loads(m)]
    assert losses == [(i, 8.0 / i) for i in range(1, 6)]
    assert any("final/eval_sft/mean_centered" in json.loads(metrics) for _, _, metrics in rows)
    assert json.loads(configs[0][1])["model"]["depth"] == 4
    assert any("report" in json.loads(metrics) for _, _, metrics in rows)
    assert "pretrain-a1b2" in everything


@pytest.mark.slow
def test_killed_training_continues_its_curve(tmp_path, mlxchat, tiny):
    pytest.importorskip("tensorboardX")
    settings = [*tiny, "stage=pretrain", "tracker=tensorboard", "pretrain.num_iterations=6"]
    settings += ["machine.checkpoint_seconds=0", f"outputs={tmp_path / 'outputs'}"]
    killed = mlxchat(*settings, environ={"MLXCHAT_CRASH_AT": "train.iteration:4"})
    assert killed.returncode == -9
    done = mlxchat(*settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: tracker" not in done.stdout
    (folder,) = (tmp_path / "outputs" / "tensorboard").iterdir()
    first = {}
    for event in events_of(folder / "pretrain"):
        for value in event.summary.value:
            if value.tag == "loss":
                first.setdefault(event.step, set()).add(round(value.simple_value, 6))
    assert sorted(first) == [1, 2, 3, 4, 5, 6]
    assert all(len(losses) == 1 for losses in first.values())  # computed twice, the same both times
    assert (folder / "results").is_dir()
