"""The three services run offline, and their files are read back."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxchat.config.schema import TrackerConfig
from mlxchat.trackers import Published, Results, Tracker


def track(kind, outputs, *, run, iterations, is_done):
    """Track iterations of a run and end it, done or interrupted."""
    folder = outputs / "runs" / run
    folder.mkdir(parents=True)
    for name in ("report.md", "report.html"):
        (folder / name).write_text("# all went well")
    said: list[str] = []
    config = TrackerConfig(kind=kind, project="parity", tags=["offline"])
    tracker = Tracker(config, folder, ids=["a"], settings={"model": {"depth": 4}}, say=said.append,
                      records=lambda step: folder / "metrics.jsonl")  # fmt: skip
    for iteration in iterations:
        tracker.log("pretrain", {"iteration": iteration, "loss": 8.0 / iteration})
    artifacts = {"pretrain": Published(id="a1b2", kind="checkpoint", folder=outputs)}
    results = Results(numbers={"eval_sft": {"mean_centered": 0.25}}, artifacts=artifacts, report=folder / "report.html")
    tracker.finish(results if is_done else Results(is_done=False))
    assert said == []


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
    track("tensorboard", tmp_path, run="1", iterations=(1, 2), is_done=True)
    folder = tmp_path / "tensorboard" / "1"
    values = [(event.step, value) for event in events_of(folder / "pretrain") for value in event.summary.value]
    found = [(step, value.tag, value.simple_value) for step, value in values if value.tag == "loss"]
    assert found == [(1, "loss", 8.0), (2, "loss", 4.0)]
    last = [v for event in events_of(folder / "results") for v in event.summary.value]
    assert ("eval_sft/mean_centered", 0.25) in [(value.tag, value.simple_value) for value in last]
    assert [value.tensor.string_val[0].decode() for value in last if value.tensor.string_val] == ["# all went well"]


@pytest.mark.slow
def test_trackio_continues_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    track("trackio", tmp_path, run="1-first", iterations=(1, 2, 3), is_done=False)
    track("trackio", tmp_path, run="2-second", iterations=(3, 4, 5), is_done=True)
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
