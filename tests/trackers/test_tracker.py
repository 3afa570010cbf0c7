"""A tracker sends records in order, continues tracked runs, and never breaks a run."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlxchat import trackers
from mlxchat.config.schema import TrackerConfig
from mlxchat.trackers import Tracker, numbers_of
from mlxchat.trackers.services import Published, Results, TrackedRun


class Notebook:
    """A service that notes what it is told, and may raise."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.runs: list[TrackedRun] = []
        self.logged: list[tuple[str, int, dict[str, float]]] = []
        self.tables: list[tuple[str, int, str, list[Any]]] = []
        self.results: Results | None = None
        self.fails_at = fails_at

    def open(self, run: TrackedRun) -> "Notebook":
        self.runs.append(run)
        return self

    def log(self, step: str, iteration: int, numbers: dict[str, float]) -> None:
        if len(self.logged) == self.fails_at:
            raise RuntimeError("no route to host")
        self.logged.append((step, iteration, numbers))

    def table(self, step: str, iteration: int, name: str, header: Any, rows: Any) -> None:
        self.tables.append((step, iteration, name, list(rows)))

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


def write(path: Path, *records: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_samples_and_rollouts_arrive_as_tables(tmp_path):
    """Iterations come once, when they are complete, and the last ones from the artifact."""
    work, done = tmp_path / "work", tmp_path / "done"
    work.mkdir()
    notebook = Notebook()
    tracker = start(tmp_path, "1", notebook, records=lambda step, name: work / f"{name}.jsonl")
    rollout = {"question": 7, "sample": 0, "prompt": "1+1", "output": "x" * 9999, "expected": None, "reward": 0.5,
               "parts": {}, "right": True, "advantage": 0.0, "tokens": 3, "finished": True}  # fmt: skip
    write(work / "samples.jsonl", *({"iteration": 1, "prompt": p, "text": f"{p}1"} for p in "ab"))
    write(work / "rollouts.jsonl", {"iteration": 2, **rollout})
    tracker.log("rl", {"iteration": 1, "loss": 1.0})
    tracker.log("rl", {"iteration": 2, "loss": 1.0})
    write(work / "rollouts.jsonl", {"iteration": 2, **rollout, "sample": 1})
    tracker.log("rl", {"iteration": 3, "loss": 1.0})
    write(work / "samples.jsonl", {"iteration": 3, "prompt": "a", "text": "a3"})
    work.rename(done)
    tracker.finish(Results(artifacts={"rl": Published(id="ab", kind="checkpoint", folder=done)}))
    long = "x" * 1999 + "…"
    assert notebook.tables == [
        ("rl", 1, "samples", [["a", "a1"], ["b", "b1"]]),
        ("rl", 2, "rollouts", [[7, sample, "1+1", long, "", 0.5, "True", 3] for sample in (0, 1)]),
        ("rl", 3, "samples", [["a", "a3"]]),
    ]


def test_service_without_tables_gets_none(tmp_path):
    notebook, said = Notebook(), []
    plain = SimpleNamespace(log=notebook.log, finish=notebook.finish)
    write(tmp_path / "samples.jsonl", {"iteration": 1, "prompt": "a", "text": "b"})
    options = {"records": lambda step, name: tmp_path / f"{name}.jsonl", "open_service": lambda run: plain}
    tracker = start(tmp_path, "1", None, said, **options)
    tracker.log("sft", {"iteration": 2, "loss": 1.0})
    tracker.finish(Results())
    assert (notebook.results, said) == (Results(), [])


def test_records_arrive_in_order(tmp_path):
    notebook = Notebook()
    tracker = start(tmp_path, "1", notebook)
    for iteration in range(1, 50):
        tracker.log("pretrain", {"iteration": iteration, "loss": 1.0 / iteration})
    tracker.log("pretrain", {"iteration": 49, "val_loss": 2.0})
    tracker.finish(Results(numbers={"pretrain": {"loss": 0.02}}))
    expected = [("pretrain", i, {"loss": 1.0 / i}) for i in range(1, 50)]
    assert notebook.logged == [*expected, ("pretrain", 49, {"val_loss": 2.0})]
    assert notebook.results.numbers == {"pretrain": {"loss": 0.02}}


def test_only_finite_numbers_are_sent():
    record = {"iteration": 3, "loss": float("nan"), "norm": 1.5, "warning": "spike", "flag": True, "count": 2}
    assert numbers_of(record, without="iteration") == {"norm": 1.5, "count": 2}


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
    write(tmp_path / "metrics.jsonl", *({"iteration": i, "loss": float(i)} for i in (1, 2, 3, 4)))
    tracker = start(tmp_path, "1", notebook, records=lambda step, name: tmp_path / f"{name}.jsonl")
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


def test_no_tracker_starts_no_thread(tmp_path):
    before = set(threading.enumerate())
    tracker = start(tmp_path, "1", None, kind="none")
    tracker.log("sft", {"iteration": 1, "loss": 1.0})
    tracker.finish()
    assert set(threading.enumerate()) <= before
    assert not list((tmp_path / "runs" / "1").iterdir())
