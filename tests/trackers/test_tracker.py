"""A tracker sends records in order, continues tracked runs, and never breaks a run."""

import json
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxchat import trackers
from mlxchat.config.schema import TrackerConfig
from mlxchat.trackers import Published, Results, TrackedRun, Tracker


class Notebook:
    """A service that notes what it is told, and may raise."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.runs: list[TrackedRun] = []
        self.logged: list[tuple[str, int, dict[str, float]]] = []
        self.results: Results | None = None
        self.fails_at = fails_at

    def open(self, run: TrackedRun) -> "Notebook":
        self.runs.append(run)
        return self

    def log(self, step: str, iteration: int, numbers: dict[str, float]) -> None:
        if len(self.logged) == self.fails_at:
            raise RuntimeError("no route to host")
        self.logged.append((step, iteration, numbers))

    def finish(self, results: Results) -> None:
        self.results = results


def start(
    outputs: Path, run: str, service: Any, said: list[str] | None = None, *, kind: str = "wandb", ids: str = "ab",
    **options: Any,
) -> Tracker:  # fmt: skip
    folder = outputs / "runs" / run
    folder.mkdir(parents=True)
    config = TrackerConfig(kind=kind, project="mlxchat", tags=["first"])
    if service:
        options["open_service"] = service.open
    return Tracker(config, folder, ids=ids, say=(said if said is not None else []).append, **options)


def test_records_arrive_in_order(tmp_path):
    notebook = Notebook()
    tracker = start(tmp_path, "1", notebook)
    for iteration in range(1, 50):
        tracker.log("pretrain", {"iteration": iteration, "loss": 1.0 / iteration})
    tracker.log("pretrain", {"iteration": 49, "val_loss": 2.0, "a": float("nan"), "b": "spike", "c": True})
    tracker.finish(Results(numbers={"pretrain": {"loss": 0.02}}))
    expected = [("pretrain", i, {"loss": 1.0 / i}) for i in range(1, 50)]
    assert notebook.logged == [*expected, ("pretrain", 49, {"val_loss": 2.0})]
    assert notebook.results.numbers == {"pretrain": {"loss": 0.02}}


def test_interrupted_run_continues_its_tracked_run(tmp_path):
    first, second = Notebook(), Notebook()
    tracker = start(tmp_path, "20260101-a", first)
    for iteration in (1, 2, 3):
        tracker.log("sft", {"iteration": iteration, "loss": 1.0})
    tracker.finish(Results(is_done=False))
    tracker = start(tmp_path, "20260102-b", second)
    for iteration in (2, 3, 4):  # from the last save on
        tracker.log("sft", {"iteration": iteration, "loss": 1.0})
    tracker.finish(Results())
    assert (second.runs[0].name, second.runs[0].key) == ("20260101-a", first.runs[0].key)
    assert (first.runs[0].is_continued, second.runs[0].is_continued) == (False, True)
    assert [iteration for _, iteration, _ in second.logged] == [4]


def test_finished_or_different_runs_are_not_continued(tmp_path):
    start(tmp_path, "1", Notebook()).finish(Results())
    start(tmp_path, "2", Notebook(), ids="abc").finish(Results(is_done=False))
    third = Notebook()
    start(tmp_path, "3", third).finish(Results())
    assert (third.runs[0].name, third.runs[0].is_continued) == ("3", False)


def test_records_before_a_crash_are_sent_first(tmp_path):
    notebook = Notebook()
    lines = [json.dumps({"iteration": i, "loss": float(i)}) + "\n" for i in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    tracker = start(tmp_path, "1", notebook, records=lambda step: tmp_path / "metrics.jsonl")
    tracker.log("sft", {"iteration": 4, "loss": 4.0})
    tracker.log("sft", {"iteration": 5, "loss": 5.0})
    tracker.finish(Results())
    assert [iteration for _, iteration, _ in notebook.logged] == [1, 2, 3, 4, 5]


def test_tracker_failure_warns_once(tmp_path):
    said: list[str] = []
    notebook = Notebook(fails_at=2)
    tracker = start(tmp_path, "1", notebook, said)
    for iteration in range(1, 6):
        tracker.log("sft", {"iteration": iteration, "loss": 1.0})
    tracker.finish(Results())
    assert len(notebook.logged) == 2
    assert said == ["warning: tracker=wandb failed (RuntimeError: no route to host); the run continues without it"]


def test_missing_tracker_package_names_the_extra(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", None)
    start(tmp_path, "1", None, said).finish(Results())
    assert len(said) == 1
    assert "pip install 'mlxchat[wandb]'" in said[0]


def test_hanging_service_does_not_delay_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
    said: list[str] = []
    end = threading.Event()

    def hang(run: TrackedRun) -> "Notebook":
        end.wait()
        return Notebook()

    began = time.monotonic()
    tracker = start(tmp_path, "1", None, said, open_service=hang)
    tracker.log("sft", {"iteration": 1, "loss": 1.0})
    tracker.finish(Results())
    end.set()
    assert time.monotonic() - began < 5
    assert "not waiting any longer" in said[0]


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
    said: list[str] = []
    tracker = start(tmp_path, "1", None, said, kind="tensorboard", settings={"model": {"depth": 4}})
    report = tmp_path / "runs" / "1" / "report.html"
    report.with_suffix(".md").write_text("# all went well")
    for iteration in (1, 2):
        tracker.log("pretrain", {"iteration": iteration, "loss": 8.0 / iteration})
    artifacts = {"pretrain": Published(id="a1b2", kind="checkpoint", folder=tmp_path)}
    tracker.finish(Results(numbers={"eval_sft": {"mean_centered": 0.25}}, artifacts=artifacts, report=report))
    assert said == []
    folder = tmp_path / "tensorboard" / "1"
    values = [(event.step, value) for event in events_of(folder / "pretrain") for value in event.summary.value]
    found = [(step, value.tag, value.simple_value) for step, value in values if value.tag == "loss"]
    assert found == [(1, "loss", 8.0), (2, "loss", 4.0)]
    last = [v for event in events_of(folder / "results") for v in event.summary.value]
    assert ("eval_sft/mean_centered", 0.25) in [(value.tag, value.simple_value) for value in last]
    assert [value.tensor.string_val[0].decode() for value in last if value.tensor.string_val] == ["# all went well"]
