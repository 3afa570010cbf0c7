"""Runs beside each other: which columns, in which order, and labels that can be told apart."""

import json
from functools import partial
from pathlib import Path

import pytest

from mlxchat.report.collect import RunReport, StepReport
from mlxchat.report.comparison import comparison_charts


@pytest.fixture
def training(tmp_path):
    return partial(make_training, tmp_path)


def make_training(root, rid, step="pretrain", last=3.0, **numbers):
    manifest = {"metrics": {"val_bpb": last}, "derived": {"total_flops": 1e10} | numbers, "run": f"run-of-{rid}"}
    manifest |= {"kind": "checkpoint", "stage": step}
    folder = root / f"{step}-{rid}"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    records = [{"iteration": i, "loss": last + 1 / (i + 1), "val_bpb": last + 1 / (i + 1)} for i in range(5)]
    return StepReport(
        name=step, stage=step, kind="checkpoint", artifact=f"{step}-{rid}", key=rid, rid=rid, inputs={}, outcome="run",
        manifest=manifest, records=records, folder=folder,
    )  # fmt: skip


def job(name, *steps):
    return RunReport(name=name, folder=Path("20261121-1"), steps=list(steps))


def test_shared_steps_are_drawn_once(training):
    shared = [training("a"), training("a"), training("b", last=2.0)]
    jobs = [job(f"seed={n + 1}", one, training(f"s{n}", "sft", last=n)) for n, one in enumerate(shared)]
    charts = {chart.name: chart for chart in comparison_charts(jobs)}
    assert "seed=1: 3.200, seed=3: 2.200." in charts["pretrain-val_bpb"].alt
    assert "seed=2: 1.457" in charts["sft-loss"].alt
